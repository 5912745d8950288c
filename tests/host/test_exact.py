"""The exact worlds through the real host, and the machinery of the table `exact` on its quick run.

What is asserted about samples is far outside what chance can do with these sizes; nothing here looks at a ranking.
"""

from __future__ import annotations

import json

import comfy.model_sampling
import pytest
import torch

from rudder import bench
from rudder.bench import exact
from rudder.bench.exact import pictures, table
from rudder.bench.exact.distances import assigned, total_variation, w2
from rudder.bench.exact.model import Continuous, conditioning, model_of
from rudder.bench.exact.worlds import WORLDS
from rudder.guidance.space import Parametrisation
from rudder.host.run import parametrisation_of

MADE = {name: make() for name, make in WORLDS.items()}


@pytest.fixture(params=table.KINDS, ids=lambda kind: kind.value)
def parametrisation(request) -> Parametrisation:
    return request.param


@pytest.mark.parametrize("world", MADE.values(), ids=MADE)
def test_the_host_hands_out_the_exact_prediction(world, parametrisation):
    base = model_of(world, parametrisation).model
    assert parametrisation_of(base.model_sampling) is parametrisation
    lowest, highest = float(base.model_sampling.sigma_min), float(base.model_sampling.sigma_max)
    sigma = lowest * (highest / lowest) ** torch.rand(64)  # between the trained timesteps too
    clean = world.true_samples(64, torch.Generator().manual_seed(0)).float()
    x = base.model_sampling.noise_scaling(sigma.reshape(-1, 1, 1, 1), torch.randn(clean.shape), clean)
    for prompt, weights in world.prompts.items():
        features = conditioning(world, prompt)[0][0].expand(64, -1, -1)
        expected = world.denoise(x.double(), sigma.double(), weights, parametrisation)
        found = base.apply_model(x, sigma, c_crossattn=features).double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_continuous_timestep_inverts_the_hosts_schedule():
    sampling, host = Continuous(), comfy.model_sampling.ModelSamplingDiscrete()
    t = torch.cat([torch.arange(1000).float(), 999 * torch.rand(1000)])
    torch.testing.assert_close(sampling.timestep(host.sigma(t)), t, rtol=0, atol=2e-3)
    torch.testing.assert_close(sampling.timestep(host.sigmas).round().long(), host.timestep(host.sigmas))


@pytest.mark.parametrize("name", ["rare", "overlap"])
def test_plain_sampling_gives_the_law_of_the_model(name, parametrisation):
    world, count, g = MADE[name], 512, torch.Generator().manual_seed(4)
    samples, evaluations = table.sample(model_of(world, parametrisation), world, 1.0, count, steps=50)
    assert evaluations == [1] * 50
    law = world.prompts[world.target]
    draws = [world.modes.sample(law, count, g) for _ in range(4)]
    floor = max(w2(a, b) for a, b in zip(draws, draws[1:]))
    assert sum(w2(samples.flatten(1).double(), d) for d in draws) / 4 < 1.5 * floor
    met = [torch.bincount(assigned(world, s.reshape(-1, *world.shape))[0], minlength=len(law)) / count
           for s in (samples, *draws)]  # fmt: skip
    assert total_variation(met[0], sum(met[1:]) / 4) < 0.12


def test_the_two_parametrisations_sample_one_law():
    """The same noise ends in the same place: the two are one flow, written in two ways."""
    world = MADE["overlap"]
    eps, flow = (table.sample(model_of(world, kind), world, 1.0, 256, steps=50)[0].flatten(1) for kind in table.KINDS)
    assert float((eps - flow).norm(dim=1).median()) < 0.15


@pytest.mark.parametrize("name", ["rare", "image"])
def test_the_rare_concept_drifts_under_plain_cfg_and_frequent_ones_do_not(name, parametrisation):
    """The calibration in worlds.py."""
    world = MADE[name]
    model = model_of(world, parametrisation)

    def right(target: str) -> list[float]:
        asked = table.replace(world, target=target)
        found = []
        for weight in (1.0, 7.5):
            nearest, _ = assigned(world, table.sample(model, asked, weight, 200, steps=20)[0])
            found.append(sum(world.concepts[i] == target for i in nearest.tolist()) / 200)
        return found

    assert all(0.1 < share < 0.7 for share in right(world.target))
    frequent = [c for c in dict.fromkeys(world.concepts) if c != world.target]
    assert all(share > 0.9 for concept in frequent[:2] for share in right(concept))


@pytest.fixture(scope="module")
def quick() -> bench.Table:
    return exact.main(bench.Options(quick=True))


def rows(quick: bench.Table, world: str) -> dict[tuple[str, str, float | None], dict]:
    part = next(part for part in quick.parts if part.name == f"exact-{world}")
    return {(row["model"], row["method"], row.get("cfg")): row for row in part.rows}


def test_every_method_has_a_row_at_every_weight_that_it_is_defined_at(quick):
    expected = {("", table.FLOOR, None)} | {
        (kind.value, method.name, weight)
        for kind in table.KINDS for method in table.METHODS for weight in table.QUICK.weights if weight >= method.least
    }  # fmt: skip
    for world in WORLDS:
        found = rows(quick, world)
        assert set(found) == expected
        for row in found.values():
            for key in ("w2", "sliced", "coverage", "right", "inside"):
                assert row[key].low <= row[key].value <= row[key].high
            assert 0 <= row["inside"].value <= row["right"].value <= 1
    assert {row["method"] for row in quick.rows} == {table.FLOOR, *(method.name for method in table.METHODS)}


def test_every_method_is_plotted():
    assert set(pictures.STYLES) == {method.name for method in table.METHODS} >= set(pictures.PICTURED)


def test_the_methods_that_repair_or_limit_are_measured():
    from rudder.guidance.contract import Prompt

    kinds = {type(g).__name__ for m in table.METHODS for g in m.make(Prompt([], "anchor"), Parametrisation.EPS)}
    assert kinds >= {"AAPB", "FixedBlend", "LimitedInterval", "R2F"}  # plain CFG is the sampler's own


def test_evaluations_are_counted_and_as_predicted(quick):
    for world in WORLDS:
        for (model, method, weight), row in rows(quick, world).items():
            if model:
                assert row["as_predicted"], (world, model, method, weight)
        for model in ("eps", "flow"):
            found = {m: row["evaluations"] for (k, m, w), row in rows(quick, world).items() if k == model and w == 12}
            assert found["CFG"] == found["R2F until 0.8"] == 2 and 1 < found["Guidance Interval"] < 2
            assert found["AAPB"] == found["AAPB, no clamp"] == found["Prompt Blend 0.5"] == 3


@pytest.mark.parametrize("model", ["eps", "flow"])
def test_the_table_sees_what_is_known(quick, model):
    clean, drifting = rows(quick, "overlap"), rows(quick, "rare")
    floor = clean["", table.FLOOR, None]
    assert clean[model, "CFG", 1.0]["w2"].value < 2 * floor["w2"].value  # clean captions: cond is the truth
    assert clean[model, "CFG", 12.0]["w2"].value > 3 * clean[model, "CFG", 1.0]["w2"].value  # over-saturation
    assert clean[model, "CFG", 12.0]["coverage"].value > 0.5  # and lost modes
    assert drifting["", table.FLOOR, None]["right"].value == 1
    assert drifting[model, "CFG", 1.0]["right"].value < 0.4  # 0.2 by construction


def test_the_table_is_saved_with_its_plots(quick, tmp_path):
    quick.save(tmp_path)
    plots = {f"exact-{world}-{plot}.png" for world in WORLDS for plot in ("samples", "distances")}
    assert {path.name for path in tmp_path.iterdir()} == {"exact.md", "exact.json"} | plots
    record = json.loads((tmp_path / "exact.json").read_text(encoding="utf-8"))
    assert [part["table"] for part in record["parts"]] == [f"exact-{world}" for world in WORLDS]
    assert set(record["parts"][0]["rows"][0]["w2"]) == {"value", "low", "high"}


@pytest.mark.parametrize(("count", "batches", "size"), [(1, 12, 16), (300, 12, 25), (3072, 12, 256), (4000, 16, 256)])
def test_fewer_samples_keep_the_batches_that_intervals_are_made_of(count, batches, size):
    plan = table.Plan().of(count)
    assert (plan.batches, plan.size) == (batches, size) and plan.count >= count
