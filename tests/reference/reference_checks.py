"""What the reference operators must fulfil, each as a function of the implementation under test.

The tests call them with the real functions, the mutation suite with broken ones. Every check compares with something
written independently: PyTorch's own modules, NumPy, or a loop over the definition.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

F64 = torch.float64


def close(given: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert given.shape == expected.shape, (given.shape, expected.shape)
    if not expected.numel():
        return
    assert torch.equal(torch.isfinite(given), torch.isfinite(expected))
    finite = torch.isfinite(expected)
    assert torch.equal(given[~finite], expected[~finite])
    error = (given - expected)[finite].abs().max().item() if finite.any() else 0.0
    scale = max(1.0, expected[finite].abs().max().item() if finite.any() else 1.0)
    assert error <= tolerance * scale, error


def differentiable(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among keyword arguments, asked for gradients."""
    return {k: v.requires_grad_(True) for k, v in inputs.items() if isinstance(v, Tensor)}


def attention_inputs(
    batch: int = 3,
    na: int = 2,
    ne: int = 3,
    length: int = 7,
    dv: int = 10,
    heads: int = 2,
    head: int = 4,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of hybrid_cross_attention in fp64."""
    generator = torch.Generator().manual_seed(seed)
    d = heads * head

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    return {
        "anchored": draw(batch, na, d),
        "exploratory": draw(batch, ne, d),
        "visual": draw(batch, length, dv),
        "q_weight": draw(d, d),
        "q_bias": draw(d),
        "k_weight": draw(d, dv),
        "k_bias": draw(d),
        "v_weight": draw(d, dv),
        "v_bias": draw(d),
        "num_heads": heads,
    }


def key_masks(batch: int, length: int) -> list[Tensor | None]:
    """None, all, random, and one item that sees nothing."""
    generator = torch.Generator().manual_seed(length)
    mask = torch.rand(batch, length, generator=generator) < 0.6
    mask[: batch // 2] |= True
    empty = mask.clone()
    empty[-1:] = False
    return [None, torch.ones(batch, length, dtype=torch.bool), mask, empty]


def multihead(inputs: dict[str, Any], key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Context [B, N, d] and weights [B, H, N, L] by torch.nn.MultiheadAttention; items that see no key are zero."""
    d, dv = inputs["k_weight"].shape
    module = nn.MultiheadAttention(d, inputs["num_heads"], kdim=dv, vdim=dv, batch_first=True, dtype=F64)
    with torch.no_grad():
        module.q_proj_weight.copy_(inputs["q_weight"])
        module.k_proj_weight.copy_(inputs["k_weight"])
        module.v_proj_weight.copy_(inputs["v_weight"])
        module.in_proj_bias.copy_(torch.cat([inputs[f"{x}_bias"] for x in "qkv"]))
        module.out_proj.weight.copy_(torch.eye(d))
        module.out_proj.bias.zero_()
        queries = torch.cat((inputs["anchored"], inputs["exploratory"]), dim=1)
        hidden = None if key_mask is None else ~key_mask
        context, weights = module(
            queries, inputs["visual"], inputs["visual"], key_padding_mask=hidden, average_attn_weights=False
        )
    if key_mask is not None:
        empty = ~key_mask.any(dim=1)
        context[empty], weights[empty] = 0.0, 0.0
    return context, weights


def check_cross_attention(ref: ModuleType, form: str) -> None:
    for length, na, ne in ((7, 2, 3), (1, 1, 1), (13, 0, 4), (5, 4, 0)):
        inputs = attention_inputs(length=length, na=na, ne=ne)
        for mask in key_masks(3, length):
            expected, _ = multihead(inputs, mask)
            output = ref.hybrid_cross_attention(**inputs, key_mask=mask, form=form)
            close(output.anchored, expected[:, :na])
            close(output.exploratory, expected[:, na:])


def check_statistics(ref: ModuleType) -> None:
    inputs = attention_inputs()
    head = inputs["q_weight"].shape[0] // inputs["num_heads"]
    group = torch.rand(3, 7, generator=torch.Generator().manual_seed(5)) < 0.4
    queries = torch.cat((inputs["anchored"], inputs["exploratory"]), dim=1)
    q = (queries @ inputs["q_weight"].T + inputs["q_bias"]).unflatten(-1, (-1, head))
    k = (inputs["visual"] @ inputs["k_weight"].T).unflatten(-1, (-1, head))
    for mask in key_masks(3, 7):
        _, weights = multihead(inputs, mask)
        seen = torch.ones(3, 7, dtype=torch.bool) if mask is None else mask
        lse = torch.empty(3, 2, 5, dtype=F64)
        for b in range(3):
            for h in range(2):
                for n in range(5):
                    terms = [math.exp(float(q[b, n, h] @ k[b, i, h]) / math.sqrt(head)) for i in range(7) if seen[b, i]]
                    lse[b, h, n] = math.log(sum(terms)) if terms else float("-inf")
        entropy = -torch.special.xlogy(weights, weights).sum(dim=-1)
        mass = (weights * group[:, None, None]).sum(dim=-1)
        for form in ("projected", "absorbed"):
            stats = ref.hybrid_cross_attention(
                **inputs, key_mask=mask, key_group=group, return_stats=True, form=form
            ).stats
            close(stats.lse, lse, 1e-11)
            close(stats.entropy, entropy, 1e-11)
            close(stats.group_mass, mass, 1e-11)


def check_guide(ref: ModuleType) -> None:
    """Context, statistics and gradient of the scale, from a loop over the definition."""
    inputs = attention_inputs()
    batch, na, length, heads = 3, 2, 7, inputs["num_heads"]
    head = inputs["q_weight"].shape[0] // heads
    generator = torch.Generator().manual_seed(6)
    guide = torch.randn(batch, length, generator=generator, dtype=F64)
    beta = torch.randn(na, heads, generator=generator, dtype=F64)
    group = torch.rand(batch, length, generator=generator) < 0.4
    queries = torch.cat((inputs["anchored"], inputs["exploratory"]), dim=1)
    q = (queries @ inputs["q_weight"].T + inputs["q_bias"]).unflatten(-1, (-1, head))
    k, v = ((inputs["visual"] @ inputs[f"{x}_weight"].T).unflatten(-1, (-1, head)) for x in "kv")
    for mask in key_masks(batch, length):
        context = torch.zeros(batch, queries.shape[1], heads, head, dtype=F64)
        lse = torch.full((batch, heads, queries.shape[1]), float("-inf"), dtype=F64)
        entropy, mass, slope = torch.zeros_like(lse), torch.zeros_like(lse), torch.zeros_like(beta)
        for b in range(batch):
            seen = [i for i in range(length) if mask is None or mask[b, i]]
            for h in range(heads):
                for n in range(queries.shape[1] if seen else 0):
                    scores = k[b, seen, h] @ q[b, n, h] / math.sqrt(head)
                    if n < na:
                        scores = scores + beta[n, h] * guide[b, seen]
                    p = scores.softmax(dim=0)
                    context[b, n, h] = p @ v[b, seen, h] + inputs["v_bias"].unflatten(0, (heads, head))[h]
                    lse[b, h, n] = scores.exp().sum().log()
                    entropy[b, h, n] = -torch.special.xlogy(p, p).sum()
                    mass[b, h, n] = p[group[b, seen]].sum()
                    if n < na:  # d of the sum of the context: ∂p/∂β = p (g - Σ p g)
                        value = v[b, seen, h].sum(dim=1)
                        slope[n, h] += (p * (guide[b, seen] - p @ guide[b, seen])) @ value
        unread = guide if mask is None else guide.masked_fill(~mask, float("nan"))
        for form in ("projected", "absorbed"):
            scale = beta.clone().requires_grad_()
            found = ref.hybrid_cross_attention(
                **inputs, key_mask=mask, key_group=group, guide=unread, guide_scale=scale, return_stats=True, form=form
            )
            close(torch.cat((found.anchored, found.exploratory), dim=1), context.flatten(2), 1e-11)
            for got, expected in zip(found.stats, (lse, entropy, mass), strict=True):
                close(got, expected, 1e-11)
            assert found.anchored.requires_grad
            (found.anchored.sum() + found.exploratory.sum()).backward()
            close(scale.grad, slope, 1e-11)


def sees(row: str, column: str, mixing: str, explore_sees_text: bool) -> bool:
    """The table of docs/method.md, written out."""
    if mixing == "full":
        return True
    table = {"A": "AT", "E": "E", "T": "T"}
    if mixing == "one_way":
        table["A"] = "AET"
    if explore_sees_text:
        table["E"] = "ET"
    return column in table[row]


def check_self_attention(ref: ModuleType) -> None:
    generator = torch.Generator().manual_seed(1)
    for na, ne, m in ((2, 3, 4), (3, 0, 2), (0, 2, 3), (2, 2, 0), (1, 1, 1)):
        size = na + ne + m
        kinds = "A" * na + "E" * ne + "T" * m
        q, k, v = (torch.randn(2, size, 2, 4, generator=generator, dtype=F64) for _ in range(3))
        text_mask = torch.rand(2, m, generator=generator) < 0.5
        text_mask[0], text_mask[1:, :1] = False, True
        for mixing in ("block", "one_way", "full"):
            for explore_sees_text in (False, True):
                for mask in (None, text_mask):
                    output = ref.stream_self_attention(
                        q, k, v, (na, ne, m), mixing=mixing, explore_sees_text=explore_sees_text, text_mask=mask
                    )
                    expected = torch.zeros_like(output)
                    for b in range(2):
                        for i, row in enumerate(kinds):
                            columns = [
                                j
                                for j, column in enumerate(kinds)
                                if sees(row, column, mixing, explore_sees_text)
                                and (column != "T" or mask is None or bool(mask[b, j - na - ne]))
                            ]
                            for h in range(2 if columns else 0):
                                p = (k[b, columns, h] @ q[b, i, h] / 2.0).softmax(dim=0)
                                expected[b, i, h] = p @ v[b, columns, h]
                    close(output, expected)


def gate_inputs(ref: ModuleType, na: int = 3, ne: int = 2, gate: int = 6, seed: int = 0) -> tuple[list[Any], float]:
    """Positional arguments of dual_gated_modulation in fp64, and α."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    batch, d, dg, r = 4, 6, 5, 3
    parameters = [
        ref.GateParameters(draw(r, width), draw(r), draw(gate, r), draw(gate)) for width in (2 + dg + 2 * d, dg + d)
    ]
    has = torch.tensor([True, False, True, True])
    return [draw(batch, na, d), draw(batch, ne, d), draw(batch), has, draw(batch, dg), *parameters], 0.7


def check_modulation(ref: ModuleType) -> None:
    for na, ne, gate in ((3, 2, 6), (1, 1, 6), (3, 2, 1)):
        (a, e, s, has, v_g, of_a, of_e), alpha = gate_inputs(ref, na, ne, gate)
        output = ref.dual_gated_modulation(a, e, s, has, v_g, of_a, of_e, alpha=alpha)
        for b in range(4):
            mean_a, mean_e = (sum(x[b, i] for i in range(x.shape[1])) / x.shape[1] for x in (a, e))
            x_a = torch.cat((s[b : b + 1], has[b : b + 1].to(F64), v_g[b], mean_a, mean_e))
            x_e = torch.cat((v_g[b], mean_e))
            for x, p, tokens, given, given_gate in (
                (x_a, of_a, a, output.anchored, output.anchored_gate),
                (x_e, of_e, e, output.exploratory, output.exploratory_gate),
            ):
                hidden = p.w1 @ x + p.b1
                hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
                expected = 2 / (1 + torch.exp(-(p.w2 @ hidden + p.b2))) - 1
                close(given_gate[b], expected)
                close(given[b], tokens[b] * (1 + alpha * expected))


def check_info_nce(ref: ModuleType) -> None:
    generator = torch.Generator().manual_seed(2)
    e = nn.functional.normalize(torch.randn(8, 5, generator=generator, dtype=F64), dim=-1)
    positives = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    labels = torch.tensor([0, 0, 0, 0, -1, -1, -1, -1])
    t = torch.tensor(1.3, dtype=F64)
    for groups in (None, labels):
        for rows in (None, torch.tensor([5, 0, 2])):
            anchors = list(range(8)) if rows is None else rows.tolist()
            terms = []
            for i in anchors:
                positive = int(positives[i])
                logits = {j: math.exp(1.3) * float(e[i] @ e[j]) for j in range(8)}
                kept = [
                    j
                    for j in range(8)
                    if j == positive
                    or (j != i and not (groups is not None and labels[i] >= 0 and labels[i] == labels[j]))
                ]
                terms.append(math.log(sum(math.exp(logits[j]) for j in kept)) - logits[positive])
            chosen = positives if rows is None else positives[rows]
            loss = ref.info_nce(e, chosen, t, groups=groups, rows=rows)
            close(loss, torch.tensor(sum(terms) / len(terms), dtype=F64))


def check_redundancy(ref: ModuleType) -> None:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(20, 6, generator=generator, dtype=F64) * 3 + 5
    e = 0.6 * a + torch.randn(20, 6, generator=generator, dtype=F64)
    matrix = torch.corrcoef(torch.cat((a, e), dim=1).T)
    diagonal = matrix[:6, 6:].diagonal()
    close(ref.redundancy_loss(a, e, eps=0.0), diagonal.square().mean())
    a[:, 0] = 4.0  # a constant channel is uncorrelated, not NaN
    expected = diagonal[1:].square().sum() / 6
    close(ref.redundancy_loss(a, e), expected, 1e-5)


def lexsort_topk(scores: np.ndarray, k: int, excluded: list[set[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Valid columns by (-score, index), padded with (-inf, -1)."""
    values = np.full((len(scores), k), -np.inf, dtype=scores.dtype)
    indices = np.full((len(scores), k), -1, dtype=np.int64)
    for i, row in enumerate(scores):
        valid = np.array([j for j in range(len(row)) if not np.isnan(row[j]) and j not in excluded[i]], dtype=np.int64)
        order = valid[np.lexsort((valid, -row[valid]))][:k]
        values[i, : len(order)], indices[i, : len(order)] = row[order], order
    return values, indices


def check_topk(ref: ModuleType) -> None:
    generator = torch.Generator().manual_seed(4)
    pool = torch.randint(-2, 3, (40, 3), generator=generator).to(F64)  # many ties, many zeros of either sign
    queries = torch.randint(-2, 3, (6, 3), generator=generator).to(F64)
    pool[7], pool[11, 0], pool[12, 0], queries[3] = float("nan"), float("inf"), float("-inf"), -0.0
    exclude = torch.tensor([[3, -1], [0, 0], [39, 7], [-1, -1], [1, 2], [5, 6]])
    scores = (queries @ pool.T).numpy()
    for k in (1, 5, 40, 50):
        for given in (None, exclude, exclude[:, 0]):
            banned = [set() for _ in range(6)]
            if given is not None:
                banned = [{int(j) for j in row.reshape(-1) if j >= 0} for row in given]
            values, indices = lexsort_topk(scores, k, banned)
            found = ref.exact_topk(queries, pool, k, exclude=given)
            assert np.array_equal(found.indices.numpy(), indices)
            assert np.array_equal(found.scores.numpy(), values)
            assert not torch.signbit(found.scores[found.scores == 0]).any()
