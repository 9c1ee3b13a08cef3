"""The examples run as documented: in this process, which spares them the imports, or where needed in their own."""

from __future__ import annotations

import importlib
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--threads", "1", "--steps", "4", "--length", "64", "--width", "32", "--batch", "2"]


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{script} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


Run = Callable[..., str]


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], threads: Callable[[int], None]
) -> Run:
    """The same in this process."""

    def run_script(script: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.syspath_prepend(ROOT / "examples")
        threads(1)
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
        return capsys.readouterr().out

    return run_script


def test_char_lm_trains_with_our_operator(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    text = run("char_lm.py", *SMALL, "--out", picture)
    assert "2 modules replaced; over 3 profiled steps 6 calls of attention_ext::attention_forward" in text
    if f"wrote {picture}" not in text:
        pytest.skip("no picture: matplotlib is not installed")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_char_lm_curves_are_equal_without_dropout(tmp_path: Path, dtype: str) -> None:
    no_dropout = ["--dropout", 0, "--assert-equal", "--dtype", dtype]
    text = run("char_lm.py", *SMALL, *no_dropout, "--out", tmp_path / "picture.png")
    assert "largest relative difference between the two loss curves" in text


def test_digits_vit_recognises_digits(tmp_path: Path, run_here: Run) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / "picture.png"
    run_here("digits_vit.py", "--epochs", 12, "--assert-accuracy", 0.85, "--picture", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_cost_measures_time_and_memory(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    text = run("cost.py", "--threads", 1, "--lengths", 32, 64, "--budget", 0.01, "--out", picture)
    for label in ("seconds per step", "peak extra memory, MiB") if sys.platform == "linux" else ("seconds per step",):
        rows = [line.split() for line in text.split(label)[1].splitlines()]
        for length in ("32", "64"):
            (numbers,) = (row[1:] for row in rows[:8] if row[:1] == [length])
            assert len([x for x in numbers if float(x) >= 0]) == 2
    assert "no picture" in text or picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("curvature.py", "--steps 10 --batch 2 --length 32 --products 10"),
        ("per_sample_gradients.py", "--steps 2 --batch 16"),
        ("gradient_penalty.py", "--steps 4 --batch 16"),
        ("mean_flow.py", "--steps 2 --batch 16 --width 32 --layers 1"),
    ],
)
def test_derivatives_are_those_of_stock_torch(tmp_path: Path, script: str, arguments: str, run_here: Run) -> None:
    pytest.importorskip("sklearn")
    picture = tmp_path / "picture.png"
    text = run_here(script, "--compare", *arguments.split(), "--out", picture)
    assert "differs from stock torch's by" in text
    assert "no picture" in text or picture.read_bytes().startswith(b"\x89PNG")


def test_long_context_has_equal_losses_and_less_memory_per_rank(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    sizes = ["--steps", 2, "--length", 3072, "--layers", 1, "--budget", 1]
    text = run("long_context.py", "--ranks", 1, 2, *sizes, "--out", picture)
    rows = [line.split() for line in text.splitlines() if line.split()[:1] == ["ranks:"] and "much" in line]
    one, two = ({"loss": float(row[2]), "peak": float(row[4])} for row in rows)
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    assert two["peak"] < 0.75 * one["peak"]
    assert float(text.split("between the losses: ")[1]) < 1e-5
    assert "no picture" in text or picture.read_bytes().startswith(b"\x89PNG")


def test_long_context_starts_by_torchrun(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    sizes = ["--steps", "1", "--length", "512", "--layers", "1", "--out", str(tmp_path / "picture.png")]
    command = [*launcher, str(ROOT / "examples" / "long_context.py"), *sizes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("largest relative difference between the losses") == 1


def test_torchscript_trains_in_python_without_the_package() -> None:
    assert "Python: loss" in run("torchscript/main.py", "--no-cpp")


def test_torchscript_trains_in_cpp() -> None:
    if shutil.which("cmake") is None and not Path(sys.executable).with_name("cmake").exists():
        pytest.skip("cmake is not installed")
    text = run("torchscript/main.py")
    assert "C++: loss" in text
    assert "largest difference" in text


@pytest.mark.parametrize(
    ("script", "arguments", "score"),
    [
        ("translation.py", "--steps 120 --examples 4000", 0.6),
        ("sentiment.py", "--steps 150 --examples 3000", 0.75),
        ("question_answering.py", "--steps 300 --examples 6000", 0.45),
        ("audio.py", "--steps 150 --examples 2000", 0.4),
        ("retrieval.py", "--steps 220 --examples 4000", 0.55),
        ("detection.py", "--steps 450 --examples 2000 --batch 24", 0.47),
        ("summarisation.py", "--steps 80 --examples 1500", 0.4),
    ],
)
def test_tasks_are_learnt(tmp_path: Path, script: str, arguments: str, score: float, run_here: Run) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    run_here(script, *arguments.split(), "--assert-score", score, "--out", tmp_path)
    name = Path(script).stem
    for picture in (f"{name}.png", f"{name}_attention.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_ragged_tables_are_learnt_without_padding(tmp_path: Path, run_here: Run) -> None:
    pytest.importorskip("matplotlib")
    text = run_here("ragged.py", "--steps", 60, "--examples", 8, "--assert-score", 0.5, "--out", tmp_path)
    assert float(text.split("relative difference between the losses: ")[1].split()[0]) < 1e-5
    assert (tmp_path / "ragged.png").read_bytes().startswith(b"\x89PNG")


def cells(text: str) -> dict[str, list[str]]:
    """The rows of the tables in the output of an example, by their first cell."""
    rows = (re.split(r"\s{2,}", line.strip()) for line in text.splitlines())
    return {first: rest for first, *rest in rows if rest}


def test_translation_decodes_as_the_whole_model_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedily, and by a beam that is wide enough for all sequences of words."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    translation = importlib.import_module("translation")
    words, steps, start, no_end = 5, 3, 1, -1
    torch.manual_seed(0)
    model = translation.Translator(words, 8).double().eval()
    torch.nn.init.normal_(model.embedding.weight, std=3)
    source, lengths = torch.randint(1, words, (3, 4)), torch.tensor([4, 2, 3])
    every = torch.cartesian_prod(torch.tensor([start]), *[torch.arange(words)] * steps)
    greedy = translation.greedy(model, source, lengths, start, steps)
    for i in range(3):
        sentence = source[i, None], lengths[i, None]
        found = translation.beam(model, *sentence, start, no_end, steps, width=len(every))
        with torch.no_grad():
            many = [x.expand(len(every), *x.shape[1:]) for x in sentence]
            scores = model(*many, every[:, :-1]).log_softmax(-1).gather(2, every[:, 1:, None]).sum((1, 2))
            assert torch.equal(found, every[scores.argmax()])
            step_by_step = model(*sentence, greedy[i, None, :-1]).argmax(-1)
            assert torch.equal(step_by_step[0], greedy[i, 1:])


def test_tutorial_fused_keeps_images_apart(run_here: Run) -> None:
    pytest.importorskip("sklearn")
    rows = cells(run_here("tutorial_fused.py", "--assert-score", 0.7))
    assert rows["output of (4, 5, 8)"] == ["RuntimeError", "(4, 5, 8)"]
    assert rows["output of (4, 8, 8)"] == ["(4, 4, 8, 8)", "(4, 8, 8)"]
    assert rows["images whose output image 1 changes"] == ["4", "1"]
    printed, ours = rows["gradient of mask, 0 in exact arithmetic"]
    assert abs(float(printed)) > 1
    assert ours == "none"


def test_tutorial_pre_norm_learns_batch_first_only(run_here: Run) -> None:
    pytest.importorskip("sklearn")  # of the example that makes the reviews
    text = run_here("tutorial_pre_norm.py", "--steps", 250, "--assert-score", 0.65)
    rows = cells(text)
    assert rows["entry 1 changes"] == ["4", "4", "1"]
    assert float(rows["printed"][-1].rstrip("%")) < 60  # of two classes
    assert float(text.split("differs from the printed class by ")[1].split()[0]) < 1e-14
    assert "16768 for dff=64, 16768 for dff=1024" in text


def test_tutorial_projected_answers_questions(run_here: Run) -> None:
    text = run_here("tutorial_projected.py", "--steps", 300, "--assert-score", 0.99)
    rows = cells(text)
    assert rows["output of (1, 5, 512)"] == ["(1, 5, 64)"] * 2
    assert rows["output of (2, 3, 5, 512)"] == ["(2, 3, 5, 64)"] * 2
    assert float(text.split("largest difference of outputs and gradients, float64: ")[1].split()[0]) < 1e-12
    assert float(text.split("about its person in ")[1].split("%")[0]) > 99


def test_tutorial_numpy_and_keras(run_here: Run) -> None:
    text = run_here("tutorial_numpy_keras.py")
    rows = cells(text)
    assert [rows[f"row {i}"][1] for i in range(3)] == ["[4.99503 5.99503]", "[4.999998 5.999998]", "[5. 6.]"]
    assert rows["row 1"][0] == "[0.002475 0.004949]"
    assert [rows[f"weights of row {i}, summed"] for i in range(3)] == [
        ["0.000006", "1.000000"], ["0.002473", "1.000000"], ["2.997520", "1.000000"],
    ]  # fmt: skip
    assert "NaN among the 6 numbers for 10 x: 6 printed, 0 ours" in text
    assert "552 parameters, output (3, 5, 16)" in text
    assert "the weights it gives back are those it was given" in text
    differences = re.findall(r"differs from .* by (\S+)", text)
    assert len(differences) == 2
    assert all(float(x) < 1e-12 for x in differences)


def test_tutorial_residual_doubles_each_round(run_here: Run) -> None:
    rows = cells(run_here("tutorial_residual.py"))
    growth = [float(rows[f"round {i}"][1]) for i in range(1, 9)]
    assert growth == sorted(growth, reverse=True)
    assert growth[-1] == 2.0
    assert all(float(rows[f"round {i}"][2]) < 1e-14 for i in range(1, 9))
