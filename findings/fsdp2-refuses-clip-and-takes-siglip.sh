#!/usr/bin/env bash
# torch 2.13.0 (torch.distributed.fsdp.fully_shard) with transformers 5.23.0: CLIP and SigLIP, built the same way, sharded over one
# rank.
# Expected: both are sharded; they differ in their loss, not in how they are built.
# Seen: CLIP ends with ValueError, because its temperature `logit_scale` is a parameter without dimensions; SigLIP's two scalars
# have one dimension of one element, and it is sharded.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy==2.4.6 2>/dev/null
FOLDER="$folder" "$folder/venv/bin/python" - <<'PY' 2>/dev/null
import os
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

dist.init_process_group("gloo", init_method=f"file://{os.environ['FOLDER']}/meet", rank=0, world_size=1)
common = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
text = common | dict(vocab_size=100, max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=0)
vision = common | dict(image_size=32, patch_size=16)
seen = {}
for name, config, model in (("CLIP", CLIPConfig, CLIPModel), ("SigLIP", SiglipConfig, SiglipModel)):
    built = model(config(text_config=text, vision_config=vision))
    try:
        fully_shard(built)
        seen[name] = "sharded"
    except ValueError as error:
        seen[name] = f"ValueError: {error}"
    print(name, tuple(built.logit_scale.shape), seen[name])
assert seen["CLIP"].startswith("ValueError: fully_shard doesn't support scalar parameters")
assert seen["SigLIP"] == "sharded"
dist.destroy_process_group()
PY
