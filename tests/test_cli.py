"""The command line and the model of its demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import require
from source_tree import make_tree, run_in

import fastll
from fastll import __main__, cli, demo, dispatch


@pytest.fixture(autouse=True)
def _numpy_backend() -> Iterator[None]:
    """Almost nothing here depends on the backend, and this one needs no compilation."""
    with fastll.use_backend("numpy"):
        yield


@pytest.fixture(scope="module")
def text() -> bytes:
    return demo.default_text()[:40_000]


@pytest.fixture(scope="module")
def corpus(text: bytes) -> demo.Corpus:
    return demo.make_corpus(text)


@pytest.fixture
def file(tmp_path: Path, text: bytes) -> str:
    path = tmp_path / "[red] text.txt"  # a name that must not be taken for markup
    path.write_bytes(text[:25_000])
    return str(path)


def invoke(*arguments: str, **env: str) -> Result:
    return CliRunner().invoke(cli.main, arguments, env=env)


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
        check=False,
    )


# The model


def test_tokens_lose_nothing(text: bytes, corpus: demo.Corpus) -> None:
    decoded = [b"".join(corpus.vocabulary[t] for t in part) for part in (corpus.train, corpus.heldout)]
    assert sum(map(len, decoded)) == len(text)
    assert len(decoded[1]) == corpus.heldout_bytes
    assert 0.05 < corpus.heldout_bytes / len(text) < 0.15
    assert sorted(b"".join(decoded)) == sorted(text)
    # the held-out part has spelled words; the vocabulary has no word that is only in that part
    assert np.any(corpus.heldout < 256)
    assert all(piece in decoded[0] for piece in corpus.vocabulary[256:])


def test_default_text_repeats_no_paragraph() -> None:
    paragraphs = [p for p in demo.default_text().split(b"\n\n") if p.strip()]
    assert len(set(paragraphs)) == len(paragraphs) > 1000


@pytest.mark.parametrize(
    "text", [b"x" * demo.MIN_BYTES, b"\n" * demo.MIN_BYTES, "文字".encode() * 5_000]
)
def test_any_text_is_split(text: bytes) -> None:
    corpus = demo.make_corpus(text)
    assert len(corpus.train) > 0
    assert len(corpus.heldout) > 0


def test_contexts_are_the_tokens_before() -> None:
    rows = demo.contexts(np.arange(100, 110))
    assert rows.shape == (10, demo.CONTEXT)
    assert rows[0].tolist() == [10] * demo.CONTEXT
    assert rows[1].tolist() == [10] * (demo.CONTEXT - 1) + [100]
    assert rows[9].tolist() == list(range(109 - demo.CONTEXT, 109))


def test_gradients_of_the_model() -> None:
    rng = np.random.default_rng(1)
    model = demo.Model(20, seed=0, dtype=np.float64)
    model.output += 0.3 * rng.standard_normal(model.output.shape)
    context, target = rng.integers(0, 20, (8, demo.CONTEXT)), rng.integers(0, 20, 8)
    loss, gradients, _ = model.nll_and_gradients(context, target)

    def nll() -> float:
        return float(fastll.cross_entropy(model.logits(context), target))

    assert loss == pytest.approx(nll(), rel=1e-12)
    step = 1e-5
    for parameter, gradient in zip(model.parameters, gradients, strict=True):
        assert gradient.shape == parameter.shape
        # the steepest entry and some others
        steepest = np.abs(gradient).argmax()
        for i in (steepest, *rng.integers(0, parameter.size, 5)):
            at = np.unravel_index(i, parameter.shape)
            kept = parameter[at]
            parameter[at] = kept + step
            above = nll()
            parameter[at] = kept - step
            below = nll()
            parameter[at] = kept
            assert gradient[at] == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-9)


def test_scores(corpus: demo.Corpus) -> None:
    vocabulary, n = len(corpus.vocabulary), len(corpus.heldout)
    uniform = demo.uniform(corpus)
    assert uniform.perplexity == pytest.approx(vocabulary)
    assert uniform.bits_per_byte == pytest.approx(np.log2(vocabulary) * n / corpus.heldout_bytes)
    p = np.bincount(corpus.train, minlength=vocabulary) + 0.5
    expected = -np.log(p / p.sum())[corpus.heldout].mean()
    assert demo.unigram(corpus).nll == pytest.approx(expected, rel=1e-5)
    untrained = demo.evaluate(demo.Model(vocabulary, seed=0), corpus)
    assert untrained.nll == pytest.approx(uniform.nll, rel=1e-6)


def test_training_beats_the_unigram(corpus: demo.Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "BATCH", 256)
    model = demo.Model(len(corpus.vocabulary), seed=0)
    steps = list(demo.train(model, corpus, steps=60))
    assert [step.number for step in steps] == list(range(1, 61))
    assert steps[-1].progress == 1
    assert all(step.likelihood_seconds > 0 for step in steps)
    assert demo.evaluate(model, corpus).nll < demo.unigram(corpus).nll - 0.25


def test_training_depends_on_the_seed_alone(corpus: demo.Corpus) -> None:
    def losses(seed: int) -> list[float]:
        model = demo.Model(len(corpus.vocabulary), seed)
        return [s.loss for s in islice(demo.train(model, corpus, steps=100, seed=seed), 4)]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_training_ends_in_time(corpus: demo.Corpus) -> None:
    model = demo.Model(len(corpus.vocabulary), seed=0)
    assert len(list(demo.train(model, corpus, steps=1000, seconds=1e-9))) == 1
    progress = [step.progress for step in demo.train(model, corpus, seconds=0.2)]
    assert progress == sorted(progress)
    assert progress[-1] == 1


@pytest.mark.parametrize(
    ("limits", "message"),
    [({}, "steps and seconds"), ({"steps": 0}, "steps is 0"), ({"seconds": np.nan}, "seconds is nan")],
)
def test_training_checks_its_limits(corpus: demo.Corpus, limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demo.train(demo.Model(300, seed=0), corpus, **limits)


# The commands


def test_demo_in_a_pipe(file: str) -> None:
    done = python("-m", "fastll", "demo", file, "--steps", "8", FASTLL_BACKEND="numpy", COLUMNS="300")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not any(ord(c) < 32 and c != "\n" for c in done.stdout)
    for expected in ("[red] text.txt", "unigram", "after training", "bits per byte", "numpy backend"):
        assert expected in done.stdout
    assert "stopped" not in done.stdout


@pytest.mark.parametrize("name", ["cython", "numpy"])
def test_demo_reports_the_backend(file: str, name: str) -> None:
    require(name)
    with fastll.use_backend(name):
        result = invoke("demo", file, "--steps", "1")
    assert result.exit_code == 0, result.output
    rows = result.stdout.partition("total s")[2].splitlines()
    assert [row.split()[0] for row in rows[2:4]] == [name, "numpy"]


def test_backends_used_are_those_that_are_called() -> None:
    choose = dispatch.choose
    with demo.backends_used() as names:
        fastll.softmax([0.0, 1.0])
        fastll.softmax([0.0, 1.0])
    assert names == ["numpy"]
    assert dispatch.choose is choose
    fastll.softmax([0.0, 1.0])


def test_demo_says_that_it_stopped_early(file: str) -> None:
    result = invoke("demo", file, "--steps", "100000", "--seconds", "0.1")
    assert result.exit_code == 0, result.output
    assert "Training stopped after 0.1 s" in result.output


def test_demo_compares_with_the_numpy_backend(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    step = demo.Adam.step

    def recorded_step(*args: Any) -> None:
        events.append("step")
        step(*args)

    @contextmanager
    def recorded_backend(name: str) -> Iterator[None]:
        events.append(name)
        yield
        events.append("default")

    monkeypatch.setattr(demo.Adam, "step", recorded_step)
    monkeypatch.setattr(fastll, "use_backend", recorded_backend)
    result = invoke("demo", file, "--steps", "6", "--quick")
    assert result.exit_code == 0, result.output
    assert events == ["step"] * 6 + ["numpy"] + ["step"] * cli.QUICK_COMPARED_STEPS + ["default"]
    assert f"the first {cli.QUICK_COMPARED_STEPS} steps" in " ".join(result.output.split())


@pytest.mark.parametrize("command", [("demo", "--steps", "1"), ("info",)])
def test_narrow_terminal(command: tuple[str, ...], file: str) -> None:
    files = [file] if command[0] == "demo" else []
    result = invoke(*command, *files, COLUMNS="40")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 40
    assert "\N{HORIZONTAL ELLIPSIS}" not in result.output  # nothing is cut off


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"", "has 0 bytes; expected at least 20,000"),
        (b"too little", "has 10 bytes; expected at least 20,000"),
        (bytes(range(256)) * 100, "is not text"),
        ("in UTF-16 ".encode("utf-16") * 2000, "is not text"),
    ],
)
def test_demo_refuses_a_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    result = invoke("demo", str(path))
    assert result.exit_code == 2
    assert message in result.stderr
    assert str(path) in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_demo_refuses_a_folder(tmp_path: Path) -> None:
    result = invoke("demo", str(tmp_path))
    assert result.exit_code == 2
    assert "cannot be read" in result.stderr


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon"])
def test_demo_refuses_seconds(file: str, value: str) -> None:
    result = invoke("demo", file, "--seconds", value)
    assert result.exit_code == 2
    assert "seconds" in result.stderr


def test_demo_is_interrupted(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.Adam, "step", interrupted)
    result = invoke("demo", file)
    assert result.exit_code == 130
    assert result.stderr == "Interrupted.\n"


def test_info_lists_every_backend() -> None:
    result = invoke("info", COLUMNS="400")
    assert result.exit_code == 0, result.output
    table, facts = result.output.split("\n\n")
    for name, status in fastll.backends().items():
        row = next(line for line in table.splitlines() if line.startswith(f"{name} "))
        reason = "" if name == "cython" else f": {status.reason}"  # that of cython is a line of its own
        assert row.rstrip().endswith("yes" if status.available else f"no{reason}")
        assert (status.version or "") in row
    assert f"threads          {fastll.get_num_threads()} " in facts
    assert fastll.__version__ in result.output
    assert np.__version__ in result.output


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("tree"))


@pytest.mark.parametrize("command", ["info", "demo"])
def test_source_tree_without_extension(tree: Path, file: str, command: str) -> None:
    arguments = [file, "--steps", "1"] if command == "demo" else []
    done = run_in(tree, "fastll", command, *arguments, FASTLL_BACKEND="numpy", COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert "No cython backend: this is a source tree without its compiled extension" in done.stderr
    assert "python -m pip install -e ." in done.stderr
    assert "extension" not in done.stdout  # it is said once


def test_extension_that_does_not_load(tree: Path) -> None:
    stale = tree / "fastll/backend/cython/_v1.py"
    stale.write_text("import fastll.no_longer_there")
    try:
        reason = json.loads(run_in(tree, "fastll", "info", "--json").stdout)["backends"]["cython"][
            "reason"
        ]
    finally:
        stale.unlink()
    assert "does not load (No module named 'fastll.no_longer_there'); run python -m pip" in reason


def test_installed_without_extension(tree: Path) -> None:
    (tree / "setup.py").rename(tree / "kept")
    try:
        said = run_in(tree, "fastll", "info").stderr
    finally:
        (tree / "kept").rename(tree / "setup.py")
    assert "fastll is installed without its compiled extension; reinstall it" in said


def test_info_as_json() -> None:
    done = python("-m", "fastll", "info", "--json", FASTLL_NUM_THREADS="3")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["threads"] == 3
    assert report["environment"]["FASTLL_NUM_THREADS"] == "3"
    assert report["versions"]["numpy"] == np.__version__
    assert report["backends"]["numpy"] == {
        "available": True,
        "reason": None,
        "version": np.__version__,
    }
    assert (report["instruction_set"] is not None) == report["backends"]["cython"]["available"]
    assert isinstance(report["gpu"], list)
    assert report["cpu"]


@pytest.mark.parametrize(
    "env",
    [{"FASTLL_NUM_THREADS": "many"}, {"FASTLL_BACKEND": "abacus"}],
    ids=lambda env: next(iter(env)),
)
def test_bad_environment(file: str, env: dict[str, str]) -> None:
    done = python("-m", "fastll", "demo", file, **env)
    assert done.returncode == 2
    assert next(iter(env.values())) in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_version() -> None:
    assert fastll.__version__ in invoke("--version").output


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fastll.cli")
    monkeypatch.setitem(sys.modules, "click", None)
    with pytest.raises(SystemExit, match=r'pip install "fastll\[cli\]"'):
        __main__.main()


def test_import_leaves_the_extra_alone() -> None:
    code = (
        "import sys, fastll; print({'click', 'rich', 'fastll.cli', 'fastll.demo'} & set(sys.modules))"
    )
    assert python("-c", code).stdout.strip() == "set()"
