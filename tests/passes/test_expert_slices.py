"""Experts by modality: each computes its own rows, and the result is bit by bit the same."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from programs import captured, prepared
from torch import fx

from mqc.analysis.experts import find_choices, rows_of
from mqc.analysis.modality import Modality
from mqc.capture import adapter_for
from mqc.errors import PassPostconditionError
from mqc.host import ProgramEngine, Prompt
from mqc.ir import Program
from mqc.passes.aifs_reorder import AifsReorder
from mqc.passes.expert_slices import ExpertSlices
from mqc.passes.modality_split import ModalitySplit
from mqc.passes.quantize_weights import QuantizeWeights
from mqc.passes.static_scales import StaticScales
from mqc.spec import named_scheme
from mqc.testing.families import FAMILIES, build_family
from mqc.testing.families.run import engine_logits, family_prompt, family_samples
from mqc.transform import PassContext, PassManager

FAMILY = "paper_experts"
SCHEME = named_scheme("w4a8")


def prompts() -> list[Prompt]:
    """No image, one, two and three: the sequences of a batch have different numbers of rows."""
    model, _ = build_family(FAMILY)
    samples = family_samples(FAMILIES[FAMILY], model.config, torch.float32, 4)
    return [family_prompt(adapter_for(model.config), sample) for sample in samples]


@pytest.fixture(scope="module")
def reordered() -> Program:
    passes = [ModalitySplit(), QuantizeWeights(SCHEME), StaticScales(SCHEME), AifsReorder()]
    context = PassContext(SCHEME, prompts())
    return PassManager(passes).run(prepared(FAMILY, "hadamard-online"), context)


@pytest.fixture(scope="module")
def sliced(reordered: Program) -> Program:
    manager = PassManager([ExpertSlices()])
    program = manager.run(reordered, PassContext())
    assert manager.records[0].counts["choices"] == 3 * 2  # qkv, out, mlp of two layers
    return program


def test_experts_are_found() -> None:
    """Five linears of each expert a layer; norms and attention belong to nobody."""
    rows = rows_of(prepared(FAMILY, "hadamard-online").components["decoder"])
    linears = Counter(m for node, m in rows.items() if node.target == torch.ops.aten.linear.default)
    assert linears == {Modality.VISUAL: 10, Modality.TEXT: 10}
    assert not rows_of(captured("llava").components["decoder"])


@pytest.mark.parametrize("options", [{}, {"padding": "left"}, {"chunk": 4}])
def test_nothing_changes(reordered: Program, sliced: Program, options: dict[str, object]) -> None:
    one = engine_logits(ProgramEngine(reordered), prompts(), **options)
    two = engine_logits(ProgramEngine(sliced), prompts(), **options)
    for left, right in zip(one, two, strict=True):
        assert torch.equal(left, right)


def test_each_expert_computes_its_own_rows(sliced: Program) -> None:
    component = sliced.components["decoder"]
    seen: dict[str, set[int]] = {"experts/0": set(), "experts/1": set()}

    class Watch(fx.Interpreter):
        def call_function(self, target: object, args: tuple, kwargs: dict) -> object:  # type: ignore[type-arg]
            result = super().call_function(target, args, kwargs)  # type: ignore[arg-type]
            if "linear_w4a8" in str(target):
                for name, rows in seen.items():
                    if name in str(self.layer):
                        rows.add(result.shape[1])
            return result

        def run_node(self, n: fx.Node) -> object:
            self.layer = [str(a.target) for a in n.all_input_nodes if a.op == "get_attr"]
            return super().run_node(n)

    def run(visual: list[int]) -> tuple[set[int], set[int]]:
        tokens = len(visual)
        modality = torch.tensor([visual], dtype=torch.bool)
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
        places = torch.arange(tokens)[None]
        given = {
            "inputs_embeds": torch.randn(1, tokens, 48),
            "position_ids": places,
            "mask": mask,
            "logit_index": places,
            "modality": modality,
        }
        cache = torch.zeros(1, 2, 0, 12)
        for rows in seen.values():
            rows.clear()
        inputs = [given.get(port.name, cache) for port in component.inputs]
        Watch(sliced.module("decoder")).run(*inputs)
        return set(seen["experts/0"]), set(seen["experts/1"])

    assert run([0, 1, 1, 1, 0, 0, 1]) == ({3}, {4})  # text rows, visual rows
    assert run([0]) == ({1}, {0})  # a decode step


def test_what_is_not_reordered_is_left_alone() -> None:
    manager = PassManager([ExpertSlices()])
    manager.run(prepared(FAMILY, "hadamard-online"), PassContext())
    assert manager.records[0].counts == {}


def test_a_choice_that_stays_whole_is_noticed(reordered: Program) -> None:
    result = ExpertSlices().run(reordered.copy(), PassContext(limit=0))
    assert find_choices(result.program.components["decoder"])
    with pytest.raises(PassPostconditionError, match="still takes whole values"):
        ExpertSlices().ensures(result)


def test_weights_of_an_expert_are_calibrated_on_its_rows() -> None:
    """Other rows must not matter: scaling text embeddings changes the text expert alone."""
    base = prepared(FAMILY, "hadamard-online")
    louder = base.copy()
    name = next(iter(louder.components["embed"].param_names()))
    louder.params[name] = louder.params[name] * torch.linspace(0.2, 5.0, 48)
    quantized = [
        PassManager([ModalitySplit(), QuantizeWeights(SCHEME)]).run(
            program, PassContext(SCHEME, prompts())
        )
        for program in (base, louder)
    ]

    def same(expert: int) -> bool:
        key = f"language.blocks.0.qkv.experts.{expert}.weight.q~1"
        one, two = (program.params[key] for program in quantized)
        return torch.equal(one, two)

    assert same(1) and not same(0)
