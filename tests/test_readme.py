"""README.md and docs/ are true: the files, links, names, commands and flags are there, and the blocks of Python run."""

import argparse
import importlib
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from programs import Process

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [*ROOT.glob("experiments/*/README.md"), ROOT / "benchmarks/README.md"]  # of which the links are looked at
PROGRAMS = ("train", "eval", "predict", "export", "convert")
FOREIGN = {"--nproc_per_node", "--inplace", "--shm-size"}  # of torchrun, setuptools and docker
TEXT = {page: page.read_text() for page in [*PAGES, *OTHERS]}
BLOCKS = {page: re.findall(r"^```(\w*)\n(.*?)^```", TEXT[page], flags=re.DOTALL | re.MULTILINE) for page in PAGES}


def commands():
    """(page, program or module, rest of the line) of every command that the pages, or the Makefile's demo, run."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    demo = re.search(r"^DEMO = (.*)$", makefile, flags=re.MULTILINE)[1]
    sources = [("Makefile", makefile.replace("$(DEMO)", demo))]
    for page in PAGES:
        text = re.sub(r"\s+", " ", TEXT[page])  # inline code may go over the end of a line
        code = [block for language, block in BLOCKS[page] if language != "python"]
        sources.append((page.name, "\n".join([*code, *re.findall(r"`(python [^`]+)`", text)])))
    for name, text in sources:
        for line in text.replace("\\\n", " ").splitlines():
            if match := re.search(r"(?:python|torchrun --nproc_per_node \d+) +(-m [\w.]+|\w+\.py)(.*)", line):
                yield name, match[1].removeprefix("-m ").removesuffix(".py"), match[2]


def parser_of(module, monkeypatch):
    """The ArgumentParser that the module's `main` fills."""
    found = []

    def keep(parser, *_):
        found.append(parser)
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(argparse.ArgumentParser, "parse_args", keep)
        module.main()
    return found[0]


def test_every_command_is_taken_by_its_program(monkeypatch, capsys):
    parsers, checked = {}, 0
    for page, name, rest in commands():
        if name not in PROGRAMS and not name.startswith("experiments."):
            assert name in ("venv", "pip", "pytest") or (ROOT / f"{name}.py").is_file(), f"{page}: {name}"
            continue
        if name not in parsers:
            path = ROOT / name.replace(".", "/")
            module = importlib.import_module(f"{name}.__main__" if path.is_dir() else name)
            parsers[name] = parser_of(module, monkeypatch)
        try:
            parsers[name].parse_args(shlex.split(rest, comments=True))
        except SystemExit as end:
            assert end.code == 0, f"{page}: {name} {rest}: {capsys.readouterr().err}"  # 0: --help
        checked += 1
    assert checked > 20


def test_every_flag_that_is_named_exists(monkeypatch):
    known = set(FOREIGN)
    for name in PROGRAMS:
        known |= parser_of(importlib.import_module(name), monkeypatch)._option_string_actions.keys()
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", TEXT[page], flags=re.DOTALL | re.MULTILINE)
        named = {flag for code in re.findall(r"`([^`]+)`", prose) for flag in re.findall(r"--[a-z][\w-]*", code)}
        if page.name == "ablations.md":
            named -= {"--run", "--output"}  # of experiments.tables, whose commands are parsed above
        assert named <= known, f"{page.name}: no program has {sorted(named - known)}"


def anchors(page):
    """The names by which links reach the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXT, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_name_is_in_its_file():
    rooms = {path.name for path in ROOT.glob("*.py")}
    assert rooms <= set(re.findall(r"\]\((\w+\.py)\)", TEXT[ROOT / "README.md"])), "README.md names every file"
    for page in PAGES:
        for file in set(re.findall(r"\b[\w/]+\.py\b", TEXT[page])):
            assert (ROOT / file).is_file() or (ROOT / "tests" / file).is_file(), f"{page.name}: {file}"
        for names, file in re.findall(r"((?:`[\w.]+`(?: and )?)+) in \[(\w+)\.py\]", TEXT[page]):
            for name in re.findall(r"`([\w.]+)`", names):
                found = importlib.import_module(file)
                for part in name.split("."):
                    found = getattr(found, part)  # AttributeError: no such class or function


def test_pages_are_short_and_narrow():
    assert len(TEXT[ROOT / "README.md"].splitlines()) <= 170
    for page in PAGES:
        assert not [line for line in TEXT[page].splitlines() if len(line) > 120], page.name
    assert (ROOT / "docs/picture.jpg").stat().st_size <= 300_000
    linked = set(re.findall(r"\]\(docs/(\w+\.md)", TEXT[ROOT / "README.md"]))
    assert linked == {page.name for page in PAGES[1:]}, "README.md leads to every page"


def test_picture_is_made_of_a_checkpoint_and_the_study(small_checkpoint, shapes, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from config import InputError
    from experiments import readme_picture

    def main(*flags):
        arguments = small_checkpoint, "--data-root", shapes, "--output", tmp_path / "picture.jpg", *flags
        monkeypatch.setattr("sys.argv", ["readme_picture", *map(str, arguments)])
        readme_picture.main()

    main("--items", 1, 3)
    with Image.open(tmp_path / "picture.jpg") as picture:
        assert picture.width > picture.height > 300
    with pytest.raises(InputError, match="--items 4: there are 4 validation images"):
        main("--items", 4)
    runs = [{"row": row, "layers": [{"box": box, "mask": 20.0}, {"box": 21.0, "mask": 20.0}]}
            for row, box in (("neither", 10.0), ("DI and BATO", 18.0), ("neither", 12.0))]  # fmt: skip
    assert readme_picture.gaps(runs, "neither").tolist() == [[-10.0, 1.0], [-8.0, 1.0]]


def run_blocks(blocks, folder):
    os.chdir(folder)
    for block in blocks:
        exec(block, {})


def test_blocks_of_python_run(tiny_checkpoint, tmp_path):
    """As they stand, beside a checkpoint, an image and the clone that they name."""
    blocks = [block for page in PAGES for language, block in BLOCKS[page] if language == "python"]
    assert len(blocks) >= 2
    shutil.copy(tiny_checkpoint, tmp_path / "checkpoint.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.jpg")
    (tmp_path / "dimaskdino").symlink_to(ROOT)  # the clone
    process = Process(run_blocks, blocks, tmp_path, output=tmp_path / "block")
    assert process.wait() == 0, process.err
