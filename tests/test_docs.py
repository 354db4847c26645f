"""README.md and docs/ say what the code is and what was measured."""

import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import geometric_mean, mean

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
RESULTS = ROOT / "benchmarks/results/amd-epyc-zen5-2cpu"
PACKAGES = ("", ".nn", ".attack", ".data", ".training", ".evaluation")


def text(page):
    return (ROOT / page).read_text()


def results(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def documented(package):
    """What docs/api.md says of a package: signatures by name."""
    heading = f"## `sparta_kernels{package}`\n"
    section = text("docs/api.md").split(heading)[1].split("\n## ")[0]
    names = {}
    for row in re.findall(r"^\| (`[^|]*`) \|", section, flags=re.MULTILINE):
        for entry in re.findall(r"`([^`]*)`", row):
            name, bracket, rest = entry.partition("(")
            assert name not in names, f"{name} stands there twice"
            names[name] = bracket + rest
    return names


def signature(function):
    """A signature without its annotations."""
    plain = inspect.signature(function)
    parameters = [each.replace(annotation=each.empty) for each in plain.parameters.values()]
    return str(plain.replace(parameters=parameters, return_annotation=plain.empty))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_page_of_public_names_has_exactly_those(package):
    module = importlib.import_module(f"sparta_kernels{package}")
    assert sorted(documented(package)) == sorted(module.__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_signatures_of_public_names_are_as_documented(package):
    module = importlib.import_module(f"sparta_kernels{package}")
    for name, shown in documented(package).items():
        if shown in ("", "(...)") or name == "SwishReLU":
            continue
        assert shown.replace("1/255", repr(1 / 255)) == signature(getattr(module, name)), name


def test_every_public_name_has_a_docstring():
    for package in PACKAGES:
        module = importlib.import_module(f"sparta_kernels{package}")
        for name in module.__all__:
            public = getattr(module, name)
            assert not callable(public) or inspect.getdoc(public), name


def test_importing_the_top_is_enough_and_loads_no_package_before_it_is_used():
    code = (
        "import sys, sparta_kernels as s; "
        "assert 'nn' in dir(s) and 'sparta_kernels.nn' not in sys.modules; "
        "s.nn.Sparta; s.attack.pgd; s.data.load; s.training.train; s.evaluation.evaluate; "
        "assert not hasattr(s, 'nonsense')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_shown_have_only_options_that_exist(page):
    from typer.main import get_command

    from sparta_kernels.cli import app

    known = get_command(app).commands
    for line in re.findall(
        r"^(?:\$ |torchrun .*)?(sparta (?:train|evaluate|reproduce) .*)$", page.read_text(), re.MULTILINE
    ):
        command, *words = line.split("#")[0].split()[1:]
        options = {name for option in known[command].params for name in [*option.opts, *option.secondary_opts]}
        assert {word for word in words if word.startswith("--")} <= options, line


def tables(page):
    """The rows of all tables, cells without emphasis."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text(page).splitlines() if line[:1] == "|"
    ]


def test_measured_gates():
    rows = [row for row in tables("docs/performance.md") if row[1:2] in (["forward"], ["backward"])]
    assert len(rows) == 8
    for batch, direction, dtype, *shown in rows:
        cells = results("ops" if batch == "128" else "ops-large-batches")["results"]
        cells = [cell for cell in cells if (cell["direction"], cell["dtype"]) == (direction, dtype)]
        for candidate, cell in zip(("kernel", "native", "compile", "eager"), shown, strict=True):
            if cell != "-":
                ratios = [each["candidates"][candidate]["ratio_to_copy"] for each in cells]
                assert cell == f"{geometric_mean(ratios):.2f} ({max(ratios):.2f})"


def test_measured_activations():
    rows = [row for row in tables("docs/performance.md") if re.fullmatch(r"\d+x\d+x\d+", row[0])]
    assert len(rows) == 4
    for size, *shown in rows:
        shape = [32, *map(int, size.split("x"))]
        cells = {cell["dtype"]: cell for cell in results("activation")["results"] if cell["shape"] == shape}
        for candidate, cell in zip(("relu", "products", "eager", "compile", "ours"), shown, strict=True):
            for dtype, number in zip(("fp32", "bf16"), cell.split(" / "), strict=True):
                measured = cells[dtype]["candidates"][candidate]["median_ms"]
                assert number == (f"{measured:.1f}" if "." in number else f"{measured:.0f}")


def iterations(name):
    """Milliseconds of an iteration by (batch, entry)."""
    return {
        (result["batch"], entry["name"]): entry["median_ms"]
        for result in results(name)["results"]
        for entry in result["entries"]
    }


def test_measured_iterations():
    measured = iterations("attack") | iterations("attack-batch-128")
    columns = ("fp32 loop", "fp32 torchattacks", "fp32 ours-eager", "bf16 loop", "bf16 ours-eager")
    rows = [row for row in tables("docs/performance.md") if row[0] in ("32", "128") and row[1] in ("SPARTA", "ReLU")]
    assert len(rows) == 4
    for batch, activation, *shown in rows:
        for column, cell in zip(columns, shown, strict=True):
            if cell != "-":
                assert cell == f"{measured[int(batch), f'{activation.lower()} {column}']:.0f}"


def steps_of_training():
    return {
        (result["activation"], result["precision"], entry["candidate"]): entry["median_ms"]
        for result in results("training")["results"]
        for entry in result["entries"]
    }


def test_measured_steps_of_training():
    measured = steps_of_training()
    columns = (("fp32", "eager"), ("fp32", "ours"), ("bf16", "eager-low"), ("bf16", "ours"))
    rows = [row for row in tables("docs/performance.md") if row[0] in ("SPARTA", "ReLU") and len(row) == 5]
    assert len(rows) == 2
    for activation, *shown in rows:
        assert shown == [f"{measured[(activation.lower(), *column)]:.0f}" for column in columns]


def test_measured_on_the_first_screen():
    rows = {row[0].partition(" (")[0]: row[1:] for row in tables("README.md")[:5]}
    attack = iterations("attack")
    whole = {entry["name"]: entry["median_ms"] for entry in results("attack-row")["results"][0]["row"]}
    training = steps_of_training()
    usual, low, fp32, bf16 = "fp32 torchattacks", "bf16 loop", "fp32 ours-eager", "bf16 ours-eager"
    steps = (("fp32", "eager"), ("bf16", "eager-low"), ("fp32", "ours"), ("bf16", "ours"))
    assert rows["one PGD iteration"] == [f"{attack[32, f'sparta {name}']:,.0f}" for name in (usual, low, fp32, bf16)]
    shown = rows["clean + PGD-10 + PGD-30 + PGD-50"]
    assert shown.pop(1) == "-"
    assert shown == [f"{whole[f'sparta {name}']:,.0f}" for name in (usual, fp32, bf16)]
    assert rows["one step of PGD-10 adversarial training"] == [f"{training[('sparta', *step)]:,.0f}" for step in steps]


def test_measured_errors_on_digits():
    rows = [row for row in tables("docs/training.md") if row[0] in ("ReLU", "SPARTA") and len(row) == 8]
    assert len(rows) == 2
    for activation, *shown in rows:
        runs = [run for run in results("adversarial-digits")["results"] if run["activation"] == activation.lower()]
        errors = [
            [run["history"][0]["robust_error"] for run in runs],
            [run["history"][-1]["robust_error"] for run in runs],
            [run["clean_error"] for run in runs],
            *([run["errors"]["targeted"][steps] for run in runs] for steps in ("10", "30", "50")),
            [run["errors"]["untargeted"]["50"] for run in runs],
        ]
        assert shown == [f"{mean(row):.1%} ({100 * min(row):.1f}-{100 * max(row):.1f})" for row in errors]


def test_measured_by_make_evaluate():
    rows = [line.split() for line in text("README.md").splitlines() if re.match(r" (standard|robust) ", line)]
    shown = [[row[0], row[-7:-3], row[-3], row[-2]] for row in ([*row[:-2], row[-2]] for row in rows)]
    expected = [
        [
            run["model"],
            [f"{error:.1%}" for error in (run["clean_error"], *(run["errors"][k] for k in ("10", "30", "50")))],
            f"{run['target_success']['50']:.1%}",
            f"{run['images_per_second']:.0f}",
        ]
        for run in results("digits-evaluate")["results"]
    ]
    assert shown == expected
