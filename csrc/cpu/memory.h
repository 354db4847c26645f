// Whether the process's allocator keeps large buffers that are freed.
#pragma once

namespace sparta {

// Whether malloc is glibc's own: not another C library's, nor one that was preloaded or linked in its place.
bool malloc_is_glibc();

// Have glibc keep freed memory instead of returning it to the kernel: no buffer is mapped by itself, the heap is never
// trimmed. False, and nothing done, where malloc is not glibc's.
bool keep_freed_memory();

// Back to glibc's own behaviour; memory that is free is returned at once. Call it only after keep_freed_memory().
void return_freed_memory();

}  // namespace sparta
