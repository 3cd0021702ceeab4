"""Attention of decoders with a cache, through transformers' attention interface."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

import structc
from structc import ops
from structc import transformers_attention as ours
from structc.passes.attention_hook import hook_refused, use_hook
from structc.passes.capture import capture
from structc.passes.clone import clone_tree
from structc.passes.detect import detect
from structc.passes.race import Raced
from structc.passes.rewrite import rewrite
from structc.records import Call, Price
from tests.zoo import ids, small

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 2,
    "pad_token_id": 1,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "llama": small("LlamaForCausalLM", **SIZES),
    "mistral": small("MistralForCausalLM", sliding_window=7, **SIZES),
    "qwen2": small("Qwen2ForCausalLM", **SIZES),
    "gpt2": small(
        "GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, pad_token_id=1, eos_token_id=2
    ),
}


@pytest.fixture(autouse=True)
def _every_call(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ours, "SMALL", 0)
    yield


def attentions(tree: nn.Module) -> list[str]:
    return [n for n, m in tree.named_modules() if type(m).__name__.endswith("Attention")]


def hooked(model: nn.Module) -> Any:
    twin = clone_tree(model)
    assert hook_refused(twin) == ""
    use_hook(twin, attentions(twin))
    return twin


def test_generate_gives_the_same_tokens() -> None:
    for name, make in MODELS.items():
        model = make().eval()
        fast = hooked(model)
        given = ids(3, 11)
        padded = torch.ones(3, 11, dtype=torch.long)
        padded[0, :4], padded[2, :9] = 0, 0
        for mask in (None, padded):
            for cache in (None, "static"):
                more = {"max_new_tokens": 9, "do_sample": False, "cache_implementation": cache}
                want = model.generate(given, attention_mask=mask, **more)
                calls = ops.call_count()
                got = fast.generate(given, attention_mask=mask, **more)
                assert torch.equal(got, want), (name, cache, mask is None)
                # two layers, one token after another; a static cache copies masks of prompts
                steps = got.shape[1] - 11 - (cache == "static")
                assert ops.call_count() - calls >= 2 * steps, (name, cache)


def test_logits_at_each_step_of_a_padded_batch() -> None:
    model = MODELS["mistral"]().eval()
    fast = hooked(model)
    given, mask = ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    with torch.inference_mode():
        caches: list[Any] = [None, None]
        for first, last in ((0, 3), (3, 9), (9, 10), (10, 20)):
            rows = []
            for at, one in enumerate((model, fast)):
                out = one(
                    given[:, first:last], attention_mask=mask[:, :last], past_key_values=caches[at]
                )
                caches[at] = out.past_key_values
                rows.append(out.logits[mask[:, first:last].bool()])
            assert torch.allclose(*rows, atol=1e-5), (first, last)


def test_the_original_is_as_it_was() -> None:
    model = MODELS["llama"]().eval()
    fast, other = hooked(model), hooked(model)
    assert model.config._attn_implementation == "sdpa"
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "config"))
    assert fast.config is not model.config is not other.config is not fast.config
    assert all(m.config is fast.config for m in fast.modules() if hasattr(m, "config"))
    assert AttentionInterface()["sdpa"] is not ours.attention
    for one, less in ((model, 0), (fast, 2), (copy.deepcopy(fast), 2), (other, 2)):
        calls = ops.call_count()
        with torch.no_grad():
            one(ids(2, 6))
        assert ops.call_count() - calls == less


def test_only_marked_modules_attend_otherwise() -> None:
    model = MODELS["llama"]().eval()
    fast = clone_tree(model)
    use_hook(fast, ["model.layers.1.self_attn", "model.layers.9.self_attn"])
    calls = ops.call_count()
    with torch.no_grad():
        fast(ids(1, 5))
    assert ops.call_count() == calls + 1


def test_what_is_not_served_is_transformers_own() -> None:
    model = MODELS["llama"]().eval()
    fast, given = hooked(model), ids(2, 8)
    calls = ops.call_count()
    loss = fast(given, labels=given).loss
    loss.backward()  # gradients
    four = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    with torch.no_grad():
        fast.train()(given)
        fast.eval()
        assert torch.allclose(
            fast(given, attention_mask=four).logits, model(given, attention_mask=four).logits
        )
        fast.double()(given)
    # without dropout a model in train mode computes the same
    assert ops.call_count() <= calls + 2


def test_arguments_that_are_not_known() -> None:
    module = nn.Module()
    module.__dict__[ours.MARK] = True
    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 6, 8)
    bias = torch.randn(1, 4, 6, 6)
    for more, less in (
        ({}, 1),
        ({"sliding_window": 3, "output_attentions": False, "softcap": None}, 1),
        ({"position_bias": bias}, 0),
        ({"something": 1}, 0),
        ({"dropout": 0.5}, 0),
    ):
        calls = ops.call_count()
        o, weights = ours.attention(module, q, k, k, None, **more)  # type: ignore[arg-type]
        assert ops.call_count() - calls == less and weights is None and o.shape == (1, 6, 4, 8)
    for scale, causal in ((None, None), (0.7, False), (0.7, True)):
        o, _ = ours.attention(module, q, k, k, None, scaling=scale, is_causal=causal)
        other = AttentionInterface()["sdpa"](module, q, k, k, None, scaling=scale, is_causal=causal)
        assert torch.allclose(o, other[0], atol=1e-6) and o.stride() == other[0].stride()


def masked(function: Any, keys: Tensor | None = None, offset: int = 3) -> Tensor:
    made = ours.mask(
        batch_size=2,
        q_length=4,
        kv_length=7,
        q_offset=offset,
        kv_offset=0,
        mask_function=function,
        attention_mask=keys,
        allow_is_causal_skip=False,
    )
    assert made is not None
    return made


def test_masks_say_what_they_are_made_of() -> None:
    keys = torch.ones(2, 7, dtype=torch.bool)
    keys[1, :2] = False
    for function, window in (
        (causal_mask_function, 0),
        (sliding_window_causal_mask_function(3), 3),
    ):
        seen = getattr(masked(function, keys), ours._SEEN)
        assert (seen.offset, seen.window) == (3, window) and torch.equal(seen.keys, keys)
        rule = structc.softmax.Softmax(1.0, causal=True, offset=3, window=window)
        visible = rule.visible(torch.arange(4), torch.arange(7))
        assert visible is not None
        assert torch.equal(masked(function, keys)[:, 0], visible & keys[:, None])
    chunked = chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.long))
    assert not hasattr(masked(chunked), ours._SEEN)
    assert not hasattr(masked(lambda b, h, q, k: k <= q), ours._SEEN)


def test_a_mask_that_was_written_to_counts_no_more() -> None:
    q, k = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 7, 8)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            mask = masked(causal_mask_function)
            assert ours._rule(q, k, mask, 1.0, True) is not None
            mask[0, 0, 0, 0] = False
            assert ours._rule(q, k, mask, 1.0, True) is None
            assert ours._rule(q, k, mask[:1].clone(), 1.0, True) is None


def test_models_that_have_another_attention_are_refused() -> None:
    assert hook_refused(nn.Linear(2, 2))
    eager = MODELS["llama"]()
    eager.config._attn_implementation = "eager"
    assert "sdpa" in hook_refused(eager)


def all_faster(cases: Any, **options: Any) -> dict[Any, Price]:
    return {c: Price(c.form, 1, 1.0, 2.0, "structc", {}, "sdpa", 0.0, "measured") for c in cases}


def test_sites_and_products() -> None:
    model = MODELS["llama"]().eval()
    captured = capture(model, Call((), {"input_ids": ids(2, 9)}))
    sites = detect(captured)
    assert [s.name for s in sites.attention] == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    ]
    assert all(s.hooked and s.case is not None and s.proven == "causal" for s in sites.attention)
    for count in (0, 1, 2):
        chosen = [replace(s, kernel="structc") for s in sites.attention[:count]]
        tree = rewrite(captured, replace(sites, attention=tuple(chosen)), {}).tree
        calls = ops.call_count()
        with torch.no_grad():
            got = tree(ids(2, 9)).logits
            assert ops.call_count() == calls + count
            assert torch.allclose(got, model(ids(2, 9)).logits, atol=1e-5)


@pytest.mark.parametrize("way", ["graph", pytest.param("modules", marks=pytest.mark.slow)])
def test_compiled_saved_and_loaded(
    way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Attention outside of graphs stays rewritten where the graphs are not used."""
    monkeypatch.setattr("structc.pricing.attention_price.price", all_faster)
    monkeypatch.setattr("structc.passes.acceptance.race", lambda *a: Raced(a[2][0], way, {}))
    model = MODELS["llama"]().eval()
    fast = structc.compile(model, {"input_ids": ids(2, 9)}, effort="none")
    assert fast.report.to_dict()["verification"]["held"]
    rows = fast.report.to_dict()["attention"]
    assert {r["kernel"] for r in rows} == {"structc through transformers' attention interface"}
    fast.save(tmp_path / "fast")
    again = structc.load(tmp_path / "fast", MODELS["llama"]())
    given = ids(2, 9)
    want = model.generate(given, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    for one in (fast, again, copy.deepcopy(fast)):
        calls = ops.call_count()
        got = one.generate(given, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert torch.equal(got, want) and ops.call_count() - calls >= 2 * 5
    eager = MODELS["llama"]()
    eager.config._attn_implementation = "eager"
    calls = ops.call_count()
    other = structc.load(tmp_path / "fast", eager)
    assert torch.equal(other.generate(given, max_new_tokens=5, do_sample=False)[:, :14], want)
    assert not any(hasattr(m, ours.MARK) for m in other.modules())


def test_attention_goes_back_where_the_model_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: Any, q: Tensor, k: Tensor, v: Tensor, *a: Any, **b: Any) -> Any:
        return q.transpose(1, 2).contiguous(), None

    monkeypatch.setattr("structc.pricing.attention_price.price", all_faster)
    monkeypatch.setattr(ours, "attention", wrong)
    model = MODELS["llama"]().eval()
    fast = structc.compile(model, {"input_ids": ids(2, 9)}, effort="none")
    monkeypatch.undo()
    ours.register()
    rows = fast.report.to_dict()["attention"]
    assert {r["kernel"] for r in rows} == {""} and all("VERIFY" in r["why"] for r in rows)
    assert fast.config._attn_implementation == "sdpa"
