"""TGQ-Former as one model: frozen towers, connector, reader and losses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedModel

from tgq_fast.arguments import checked
from tgq_fast.data.catalog import Catalog
from tgq_fast.data.images import PictureLike
from tgq_fast.data.items import Item
from tgq_fast.data.rejects import RejectLog
from tgq_fast.defaults import own_randomness, plain_defaults, single_precision
from tgq_fast.errors import ArgumentError
from tgq_fast.models import checkpoint
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.direct import DirectReadout
from tgq_fast.models.dtypes import as_dtype
from tgq_fast.models.encoding import as_examples, progress_bar, stored_batches
from tgq_fast.models.features import FeatureStore
from tgq_fast.models.hub import local_folder
from tgq_fast.models.inference import evaluating, in_run, packed_weights, running
from tgq_fast.models.objective import weighted_losses
from tgq_fast.models.outputs import ConnectorOutput, FrozenFeatures, TGQFormerOutput
from tgq_fast.models.processing import ProcessedItems, PromptInputs, TGQFormerProcessor
from tgq_fast.models.publishing import Publishing
from tgq_fast.models.readers import ImageReader, LightReader, LLMReader, ReaderOutput, build_reader, merged_adapters
from tgq_fast.models.second_look import SecondLook, both_looks
from tgq_fast.models.tower_holder import TowerHolder
from tgq_fast.models.towers import TextTower, VisionTower, load_text_tower, load_vision_tower
from tgq_fast.models.whitening import Whitening
from tgq_fast.models.zoo import connector_spec
from tgq_fast.models.zoo.budget import build_connector
from tgq_fast.ops.dispatch import requested_backend

__all__ = ["TGQFormerModel"]

Encodable = Item | Mapping[str, Any] | Image.Image | str | Path
_TEXT = "Give metadata as a row, such as {'category': 'Sofas', 'attributes.colour': 'blue'}: an item without a picture."
_PACK_FROM = 64  # items from which repacking the connector's weights pays


class TGQFormerModel(TowerHolder, Publishing, PreTrainedModel):  # type: ignore[misc]  # push_to_hub has options of ours
    """Items → embeddings.

    The frozen towers are no submodules: they are loaded by name on first use, never trained and never saved. A model
    that only sees cached features never loads them.

    Args:
        config: with the towers' widths filled in; see :meth:`from_config_with_towers`.

    Raises:
        CheckpointError, DependencyError: the configured LLM cannot be loaded.
    """

    config_class = TGQFormerConfig
    config: TGQFormerConfig
    base_model_prefix = ""
    main_input_name = "features"
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True  # of the layers of tgq and qformer
    _no_split_modules: list[str] = []  # noqa: RUF012 (transformers' own declaration)

    def __init__(self, config: TGQFormerConfig) -> None:
        with single_precision():
            self._build(config)

    def _build(self, config: TGQFormerConfig) -> None:
        super().__init__(config)
        # Before the parts exist: their initialisation is their own, and an LLM brings its weights.
        self.post_init()
        self.whitening = Whitening(config) if config.whitening else None
        self.connector = build_connector(config)
        self.reader: LightReader | LLMReader | ImageReader = build_reader(config)
        self.direct = DirectReadout(config) if config.direct_width else None
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init)))

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every part initialises itself."""

    # ------------------------------------------------------------------ assembling

    @classmethod
    def from_config_with_towers(
        cls,
        config: TGQFormerConfig,
        *,
        vision: VisionTower | None = None,
        text: TextTower | None = None,
    ) -> TGQFormerModel:
        """A new model whose configuration carries the towers' widths.

        Args:
            config: left unchanged; a copy is completed.
            vision, text: towers that are already loaded; None: loaded as the configuration names them.
        """
        vision = vision or load_vision_tower(config.vision_tower, attention=config.tower_attention)
        text = text or load_text_tower(
            config.text_tower, vision=vision, llm=config.llm, max_field_tokens=config.max_field_tokens
        )
        config = config.with_towers(vision, text)
        if config.agreement == "dual_encoder" and text.pooled_width is None:
            raise ArgumentError("agreement", "'dual_encoder'", "'alignment' or 'none': the towers are no dual encoder")
        model = cls(config)
        model.set_towers(vision, text)
        return model

    @classmethod
    def zero_shot(cls, config: TGQFormerConfig, whitening: Whitening | None = None) -> TGQFormerModel:
        """The model that needs no training: its embedding is the pooled image feature, whitened with `whitening`.

        Args:
            config: names the towers and carries their widths.
            whitening: fitted.
        """
        model = cls(config.zero_shot(whitened=whitening is not None))
        if whitening is not None and model.whitening is not None:
            model.whitening.load_state_dict(whitening.state_dict())
        return model.eval()

    # ------------------------------------------------------------------ parameters

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters that train."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def freeze(self) -> None:
        """No parameter trains."""
        self.requires_grad_(False)

    def unfreeze(self) -> None:
        """What the configuration trains, trains: all but the LLM's own weights."""
        for name, parameter in self.named_parameters():
            if not name.startswith("reader.llm.") or "lora_" in name:
                parameter.requires_grad_(True)

    # ------------------------------------------------------------------ forward

    def forward(
        self,
        features: FrozenFeatures | None = None,
        prompt: PromptInputs | None = None,
        *,
        positives: Tensor | None = None,
        groups: Tensor | None = None,
        return_attention: bool = False,
        return_dict: bool = True,
        **inputs: Any,
    ) -> TGQFormerOutput | tuple[Any, ...]:
        """Embed M items, and with `positives` compute the training loss.

        Args:
            features: of M items; or as keywords its fields, or what the processor returned: `model(**processor(…))`.
            prompt: LLM prompts, needed with an LLM.
            positives: [M] row of each item's positive in this batch, -1 for an item that is no anchor.
            groups: [M] labels of known co-positives (negative: none), left out of the denominator.
            return_attention: also return the connector's attention [M, N, L].
            return_dict: False gives a tuple.

        Returns:
            :class:`TGQFormerOutput`; embeddings are fp32 and L2-normalised.
        """
        if features is None:
            if not inputs:
                raise ArgumentError("features", None, "a FrozenFeatures")
            if "pixel_values" in inputs:
                processed = ProcessedItems(prompt=prompt, **inputs)
                features = self.extractor.features(processed)
                if not self.training:
                    features = SecondLook(self)(features, processed.pixels)
            else:
                features = FrozenFeatures(**inputs)
        device = self.logit_scale.device
        features = features.to(device)
        prompt = None if prompt is None else prompt.to(device)
        read, connected = self._read(features, prompt, return_attention)
        if (rows := features.close_rows) is not None:
            close, _ = self._read(features.close_ups(), None if prompt is None else prompt.rows(rows))
            read = both_looks(read, close, rows)
        output = TGQFormerOutput(embedding=read.embedding, visual_embedding=read.visual_embedding, connector=connected)
        if positives is not None:
            groups = None if groups is None else groups.to(device)
            terms = weighted_losses(self.config, read, connected, self.logit_scale, positives.to(device), groups)
            output.loss = torch.stack([weight * term for weight, term in terms.values()]).sum()
            output.losses = {name: term.detach() for name, (_, term) in terms.items()}
        return output if return_dict else output.to_tuple()

    def _read(
        self, features: FrozenFeatures, prompt: PromptInputs | None, return_attention: bool = False
    ) -> tuple[ReaderOutput, ConnectorOutput]:
        """The whole way from frozen features; controls see no picture or no metadata anywhere."""
        spec = connector_spec(self.config.connector)
        if not spec.sees_picture:
            features = features.without_picture()
        if not spec.reader_sees_metadata:
            features = features.without_metadata()
        if self.whitening is not None:
            features = self.whitening(features)
        connected: ConnectorOutput = running(self.connector)(features, return_attention=return_attention)
        assert connected.tokens is not None  # every connector sets it
        read: ReaderOutput = self.reader(connected.tokens, features, prompt)
        if self.direct is not None:
            parts = self.direct(read.embedding, read.visual_embedding, features, connected.patch_agreement)
            read = ReaderOutput(*parts)
        return read, connected

    # ------------------------------------------------------------------ encoding

    def encoding(self) -> AbstractContextManager[Any]:
        """Around a run of :meth:`encode` calls: the connector's weights are packed once, for all of them.

        Every call in it, of the same thread, uses the packed weights, however few its items, so that an item's
        embedding does not depend on how the run is cut into calls of the same batches. Weights must not change inside.
        A long `encode` opens it itself.
        """
        return packed_weights(self.connector)

    def preparation(self) -> Callable[[PictureLike, str], Tensor]:
        """See :meth:`FeatureExtractor.preparation`; :meth:`encode` takes the results as `pixels`."""
        return self.extractor.preparation()

    @plain_defaults()
    @checked
    def encode(
        self,
        items: Catalog | Sequence[Encodable] | Encodable = (),
        *,
        text: str | Sequence[str] | None = None,
        batch_size: int = 64,
        show_progress_bar: bool = False,
        fields: Sequence[Mapping[str, object] | None] | Mapping[str, object] | None = None,
        root: str | Path | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        convert_to_numpy: bool = False,
        features: FeatureStore | None = None,
        rejects: RejectLog | None = None,
        workers: int = 2,
        pixels: Sequence[Tensor | None] | None = None,
    ) -> Tensor | np.ndarray:
        """Embeddings of items, in the order given.

        The model is evaluated without dropout whatever its mode; the same batches give the same bytes, whatever default
        dtype and device, autocast and precision of fp32 products the process has. Any number of threads may call this
        on one model.

        Args:
            items: a catalogue; or a list of catalogue items, of rows as in a metadata file ("file_name"; or "image"
                with a picture or a path), of pictures or of paths of pictures; or a single one.
            text: refused: items are embedded, sentences are not. Metadata is given as a row or by `fields`.
            batch_size: items per batch.
            show_progress_bar: draw one on stderr.
            fields: metadata of each picture (name → value, names of `config.fields`), where `items` are pictures or
                paths.
            root: folder that relative file names refer to; a catalogue brings its own.
            on_error: "raise" on an unusable image, or "skip": its row is NaN, which every consumer refuses, so that
                rows stay aligned with `items`.
            convert_to_numpy: return an array.
            features: cached features; rows of a catalogue that the store was built on are read from there.
            rejects: gets one entry per skipped image.
            workers: threads that decode images.
            pixels: what :meth:`preparation` made of each item's picture, None for an item without one.

        Returns:
            [n, D] fp32 on the CPU ([D] for a single item).

        Raises:
            ImageError: policy "raise" and an image cannot be used.
            ArgumentError: something is not an item, `fields` names one that does not guide, or `batch_size` < 1.
        """
        if text is not None:
            raise ArgumentError(
                "text", repr(text)[:80], "items: this model has no text encoder into their space", _TEXT
            )
        if isinstance(items, str) and not Path(items).suffix and not (Path(root or ".") / items).exists():
            raise ArgumentError("items", repr(items)[:80], "a picture file, a row or a catalogue", _TEXT)
        if batch_size < 1:
            raise ArgumentError("batch_size", batch_size, "at least 1")
        if on_error not in ("raise", "skip"):
            raise ArgumentError("on_error", repr(on_error), "'raise' or 'skip'")
        if features is None and connector_spec(self.config.connector).foreign_metadata:
            raise ArgumentError(
                "features", None, "the catalogue's FeatureStore: this control gives each item the metadata of another"
            )
        single = isinstance(items, (Item, Mapping, Image.Image, str, Path))
        several: Any = [items] if single else items
        examples = as_examples(several, fields=fields, root=root, known=self.config.fields)
        result = torch.full((len(examples), self.config.embedding_size), float("nan"), dtype=torch.float32)
        many = len(examples) >= _PACK_FROM or in_run(self.connector)
        packing = self.encoding() if many or requested_backend(None) == "cpp" else nullcontext()
        whole = merged_adapters(self.reader)
        shown = progress_bar(len(examples), show_progress_bar)
        with evaluating(self), whole, torch.inference_mode(), packing, shown as advance:
            if features is not None:
                features = features.for_connector(self.config.connector)
                batches = stored_batches(examples, batch_size, on_error, features, self.processor)
            else:
                batches = self.extractor.batches(
                    examples,
                    batch_size,
                    on_error=on_error,
                    rejects=rejects,
                    workers=workers,
                    pixels=pixels,
                    fill=many,
                )
            look = SecondLook(self)
            for rows, inputs, pixel_values in batches:
                if rows:
                    inputs["features"] = look(inputs["features"], pixel_values)
                    output = self(**inputs)
                    result[rows] = output.embedding.float().cpu()
                advance(min(batch_size, len(examples)))
        result = result[0] if single else result
        return result.numpy() if convert_to_numpy else result

    # ------------------------------------------------------------------ saving

    def saved_state(self, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What a checkpoint holds: every parameter and buffer but an LLM's own weights."""
        state = dict(self.state_dict() if state_dict is None else state_dict)
        if isinstance(self.reader, LLMReader):
            kept = {f"reader.{name}" for name in self.reader.saved_names()}
            state = {name: value for name, value in state.items() if not name.startswith("reader.") or name in kept}
        return state

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write config.json, model.safetensors, processor_config.json and tgq_former.py (which tells transformers' Auto
        classes where the code is); frozen weights are left out.

        Each file appears atomically; the weights carry a digest that :meth:`from_pretrained` checks.

        Args:
            push_to_hub: also upload them as :meth:`push_to_hub` does, with its options; `repo_id` defaults to the name
                of the folder. Other arguments of transformers' save_pretrained are accepted and have no effect.
        """
        if is_main_process:
            folder = Path(save_directory)
            checkpoint.save_model(folder, self.config, self.saved_state(state_dict), architecture=type(self).__name__)
            TGQFormerProcessor(self.config).save_pretrained(folder)
            if push_to_hub:
                self.upload(folder, options.pop("repo_id", None) or folder.resolve().name, **options)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *_: Any, config: TGQFormerConfig | None = None, **kwargs: Any
    ) -> TGQFormerModel:
        """Load a model that :meth:`save_pretrained` wrote, in eval mode, on the CPU or PyTorch's default device.

        Nothing is executed on load.

        Args:
            pretrained_model_name_or_path: local folder, or "owner/name" of a model on the hub.
            config: instead of the folder's own.
            **kwargs: configuration fields to override, e.g. `vision_tower="/models/clip"`; `dtype` casts the model;
                `revision`, `token`, `cache_dir`, `force_download` and `local_files_only` are for the hub; other
                arguments of transformers' from_pretrained are accepted and have no effect.

        Raises:
            CheckpointError: missing, corrupt, foreign or incompatible files.
        """
        folder = local_folder(pretrained_model_name_or_path, kwargs)
        config = copy.deepcopy(config) if config is not None else checkpoint.load_config(folder)
        for name, value in kwargs.items():
            if name in config.to_dict() and name not in ("dtype", "torch_dtype"):
                setattr(config, name, value)
        device = torch.get_default_device()
        # What is drawn for the parts is replaced by the weights.
        with plain_defaults(), own_randomness(), torch.inference_mode(False):
            state = checkpoint.load_state(folder)
            model = cls(config)
            checkpoint.load_into(model, state, wanted=set(model.saved_state()), folder=folder)
            if device.type not in ("cpu", "meta"):
                nn.Module.to(model, device)
            if (dtype := as_dtype(kwargs.get("dtype", kwargs.get("torch_dtype")))) is not None:
                nn.Module.to(model, dtype=dtype)
        model.name_or_path = str(folder)
        model.eval()
        return model


AutoConfig.register(TGQFormerConfig.model_type, TGQFormerConfig, exist_ok=True)
AutoModel.register(TGQFormerConfig, TGQFormerModel, exist_ok=True)
AutoProcessor.register(TGQFormerConfig, TGQFormerProcessor, exist_ok=True)
