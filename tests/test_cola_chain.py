"""The chain: knots, links, budgets, optimizers, and what must be refused."""

import gc
import math
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from effnb.finetune import ChainOfLoRA, LoRALinear, fit_chain, linear_decay, split_steps

ADAM = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.v(torch.tanh(self.q(x)))))


def problem(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = Net().to(dtype)
    x, y = torch.randn(64, 12, dtype=dtype), torch.randint(3, (64,))
    return model, x, lambda model, step: nn.functional.cross_entropy(model(x), y)


def make(model, ranks=(2, 2), **options):
    options.setdefault("generator", torch.Generator().manual_seed(1))
    return ChainOfLoRA(model, options.pop("targets", ["q", "v"]), ranks, **options)


# ----------------------------------------------------------------------------------------------------- the chain


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_the_function_is_continuous_at_every_knot(dtype, limit):
    """T4: neither the knot nor the new link changes what the model computes."""
    model, x, loss = problem(dtype=dtype)
    chain = make(model, (3, 2, 1))
    for k in range(3):
        optimizer = ADAM(chain.parameters_to_tune())
        for step in range(20):
            optimizer.zero_grad()
            loss(chain.model, step).backward()
            optimizer.step()
        before = chain.model(x)
        chain.tie_knot()
        tied = chain.model(x)
        assert (tied - before).abs().max() <= 2 * limit * before.abs().max()
        if k < 2:
            chain.extend()
            assert torch.equal(chain.model(x), tied) and chain.link == k + 2
    assert torch.equal(chain.unload()(x), tied)


def test_the_update_is_the_sum_of_the_links():
    model, _, loss = problem(dtype=torch.float64)
    start = model.q.weight.detach().clone()
    chain = make(model, (2, 2, 2), alpha=6)
    fit_chain(chain, loss, 60, ADAM)
    rank = chain.accumulated_rank("q")
    torch.testing.assert_close(model.q.base.weight - start, chain.delta_weight("q"), rtol=1e-10, atol=1e-12)
    assert rank == 6 == int(torch.linalg.matrix_rank(chain.delta_weight("q"), rtol=1e-4))
    chain.unload()
    torch.testing.assert_close(model.q.weight - start, chain.delta_weight("q"), rtol=1e-10, atol=1e-12)
    assert chain.accumulated_rank("q") == 6


def test_the_open_link_counts():
    model, _, loss = problem()
    chain = make(model, (2,))
    assert chain.accumulated_rank("q") == 0
    fit_chain(chain, loss, 5, ADAM, tie=False)
    assert chain.accumulated_rank("v") == 2


def test_only_one_link_is_ever_trained():
    model, _, loss = problem()
    chain = make(model, (2, 2, 2))
    counts, sizes = set(), set()

    def watch(chain, step, _):
        counts.add(chain.trainable_parameters)
        sizes.add(sum(p.grad.numel() for p in chain.parameters_to_tune()))

    fit_chain(chain, loss, 9, ADAM, callback=watch)
    assert counts == sizes == {2 * 2 * 2 * 12}
    assert all(p.grad is None for p in model.parameters())


def test_the_model_comes_back_as_it_was():
    """K7: same modules, same keys, same flags; the bias is untouched."""
    model, _, loss = problem()
    model.head.bias.requires_grad_(False)
    keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    bias, weight = model.q.bias.detach().clone(), model.q.weight
    chain = make(model)
    fit_chain(chain, loss, 10, ADAM)
    assert chain.unload() is model is chain.unload()
    assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == types
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model.q.bias, bias) and model.q.weight is weight


def test_unload_ties_the_open_link():
    model, x, loss = problem()
    chain = make(model, (2,))
    fit_chain(chain, loss, 10, ADAM, tie=False)
    before = chain.model(x)
    torch.testing.assert_close(chain.unload()(x), before)


@pytest.mark.parametrize("warm", [True, False])
def test_rank_steps_down_and_the_scale_stays(warm):
    model, _, loss = problem()
    chain = make(model, (4, 2, 1), alpha=8)
    seen = []
    fit_chain(chain, loss, 6, ADAM, callback=lambda c, *_: seen.append((c.trainable_parameters, c.model.q.scale)))
    assert seen[::2] == [(192, 2.0), (96, 2.0), (48, 2.0)] and seen[::2] == seen[1::2]
    assert model.q.alpha == 2.0


def test_extend_takes_a_rank_of_its_own_and_goes_on_beyond_the_plan():
    model, _, loss = problem()
    chain = make(model, (4, 2))
    fit_chain(chain, loss, 4, ADAM)
    chain.extend()
    assert chain.link == 3 and chain.model.q.r == 2
    nn.init.ones_(model.q.B)
    chain.tie_knot()
    chain.extend(5)
    assert chain.model.v.r == 5 and chain.ranks[-1] == 5


def test_every_link_draws_new_factors_and_a_generator_repeats_the_chain():
    runs = []
    for _ in range(2):
        model, _, loss = problem()
        chain = make(model, (2, 2), generator=torch.Generator().manual_seed(7))
        start = model.q.A.detach().clone()
        fit_chain(chain, loss, 2, ADAM, callback=lambda *_: None)
        assert not torch.allclose(model.q.A, start, atol=0.1)
        runs.append(chain.unload().q.weight)
    assert torch.equal(*runs)


def test_the_global_generator_is_left_alone():
    model, _, loss = problem()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    fit_chain(make(model), loss, 4, ADAM)
    assert torch.equal(torch.rand(2), expected)


def test_random_factors_that_stay():
    """RAC-LoRA's links: A keeps its random start, B alone is trained."""
    model, _, loss = problem()
    chain = make(model, (2, 2), train_A=False)
    start = model.q.A.detach().clone()
    assert chain.trainable_parameters == 2 * 2 * 12
    fit_chain(chain, loss, 4, ADAM)
    assert not torch.equal(model.q.A, start) and not model.q.A.requires_grad
    assert chain.accumulated_rank("q") == 4


# ------------------------------------------------------------------------------------------- optimizer, schedule


def test_after_extend_one_step_changes_b():
    model, _, loss = problem()
    chain = make(model)
    fit_chain(chain, loss, [3, 3], ADAM)
    chain.extend()
    optimizer = ADAM(chain.parameters_to_tune())
    loss(chain.model, 0).backward()
    optimizer.step()
    assert all(layer.B.abs().sum() > 0 for layer in (model.q, model.v))


def test_a_stale_optimizer_is_noticed():
    model, _, loss = problem()
    chain = make(model, (4, 2))
    optimizer = ADAM(chain.parameters_to_tune())
    for k in range(2):
        optimizer.zero_grad()
        loss(chain.model, 0).backward()
        optimizer.step()
        if k:
            with pytest.warns(UserWarning, match="link 2 has not trained"):
                chain.tie_knot()
        else:
            chain.tie_knot()
            chain.extend()


def test_old_optimizers_are_collected_and_nothing_else_lives():
    """K6: after a knot only the moments of one link exist, as many bytes as LoRA's."""
    model, _, loss = problem()
    chain, made, sizes = make(model, (2, 2, 2)), [], []

    def factory(parameters):
        gc.collect()
        assert [ref() for ref in made] == [None] * len(made)
        optimizer = ADAM(parameters)
        made.append(weakref.ref(optimizer))
        return optimizer

    def watch(chain, step, _):
        state = made[-1]().state
        assert set(state) == set(chain.adapter_parameters())
        sizes.append(sum(t.numel() for s in state.values() for t in (s["exp_avg"], s["exp_avg_sq"])))

    fit_chain(chain, loss, 6, factory, callback=watch)
    assert len(made) == 3 and set(sizes) == {2 * chain.trainable_parameters}


def test_every_link_has_a_new_optimizer_and_schedule():
    model, _, loss = problem()
    rates, counts = [], []

    def factory(parameters):
        factory.last = ADAM(parameters)
        return factory.last

    def watch(chain, step, _):
        rates.append(factory.last.param_groups[0]["lr"])
        counts.append(int(factory.last.state[chain.adapter_parameters()[0]]["step"]))

    history = fit_chain(make(model), loss, 9, factory, linear_decay, watch)
    assert [len(h) for h in history] == [4, 5] and counts == [1, 2, 3, 4, 1, 2, 3, 4, 5]
    assert rates == pytest.approx([0.015, 0.01, 0.005, 0, 0.016, 0.012, 0.008, 0.004, 0])


def test_the_steps_are_counted_over_all_links():
    model, _, loss = problem()
    seen = []
    fit_chain(make(model, (1, 1, 1)), lambda m, step: seen.append(step) or loss(m, step), 8, ADAM)
    assert seen == list(range(8))


def test_a_head_carries_on():
    """Rule 4: its weights go on at a knot; its optimizer state is new, unless it is kept."""
    for keep in (False, True):
        model, _, loss = problem()
        chain = make(model, modules_to_save=["head"], keep_head_state=keep)
        at_knot, steps = {}, []

        def factory(parameters, model=model, at_knot=at_knot):
            at_knot[len(at_knot)] = model.head.weight.detach().clone()
            factory.last = ADAM(parameters)
            return factory.last

        def watch(chain, step, _, steps=steps, model=model):
            steps.append(
                (int(factory.last.state[model.head.weight]["step"]), int(factory.last.state[model.q.B]["step"]))
            )

        fit_chain(chain, loss, 4, factory, callback=watch)
        assert not torch.equal(at_knot[0], at_knot[1])
        assert steps == ([(1, 1), (2, 2), (3, 1), (4, 2)] if keep else [(1, 1), (2, 2), (1, 1), (2, 2)])
        weight = model.head.weight.detach().clone()
        assert torch.equal(chain.unload().head.weight, weight)


def test_one_link_is_lora():
    """T1 without peft: the chain of one link is a layer trained by hand."""
    model, _, loss = problem()
    chain = make(model, (2,), alpha=4)
    fit_chain(chain, loss, 30, ADAM, linear_decay)
    twin, _, loss = problem()
    generator = torch.Generator().manual_seed(1)
    twin.requires_grad_(False)
    for name in ("q", "v"):
        setattr(twin, name, LoRALinear(getattr(twin, name), 2, 4, generator=generator))
    optimizer = ADAM([p for p in twin.parameters() if p.requires_grad])
    schedule = linear_decay(optimizer, 30)
    for step in range(30):
        optimizer.zero_grad()
        loss(twin, step).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(chain.unload().q.weight, twin.q.weight, rtol=1e-6, atol=1e-6)


def test_a_restart_without_a_knot():
    """The ablation: new optimizer and schedule, same adapter, hence the rank of one link."""
    model, _, loss = problem()
    chain = make(model, (2, 2, 2))
    factors = chain.adapter_parameters()
    fit_chain(chain, loss, 9, ADAM, linear_decay, tie=False)
    assert chain.link == 1 and chain.accumulated_rank("q") == 2
    assert all(a is b for a, b in zip(factors, chain.adapter_parameters(), strict=True))


def test_a_chain_is_taken_up_again():
    model, _, loss = problem()
    chain = make(model, (2, 2, 2))
    fit_chain(chain, loss, 3, ADAM)
    chain.extend()
    assert [len(losses) for losses in fit_chain(chain, loss, 5, ADAM)] == [5] and 6 < chain.accumulated_rank("q") <= 8


@pytest.mark.parametrize(("steps", "links", "expected"), [(12, 4, [3] * 4), (11, 3, [3, 3, 5]), (3, 3, [1] * 3)])
def test_split(steps, links, expected):
    assert split_steps(steps, links) == expected


@pytest.mark.parametrize("steps", [1, 0, [5], [5, 0], [1, 2, 3], [2.0, 3], []])
def test_bad_steps(steps):
    model, _, loss = problem()
    with pytest.raises(ValueError, match="steps must"):
        fit_chain(make(model), loss, steps, ADAM)


def test_bad_schedules():
    optimizer = ADAM([nn.Parameter(torch.ones(1))])
    for bad in ((0, 0.0), (3, -0.1), (3, 1.5)):
        with pytest.raises(ValueError, match="steps must be >= 1 and end"):
            linear_decay(optimizer, *bad)


@pytest.mark.parametrize("value", [None, 0.5, torch.ones(2, requires_grad=True), torch.tensor(1.0)])
def test_bad_losses(value):
    with pytest.raises(ValueError, match="step_fn must return a scalar loss"):
        fit_chain(make(problem()[0]), lambda model, step: value, 4, ADAM)


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("ranks", [(), 4, (2, 0), (13,), (2, 2.0), (2, 13)])
def test_bad_ranks(ranks):
    model, _, _ = problem()
    with pytest.raises(ValueError, match=r"rank|r must"):
        make(model, ranks)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("alpha", [0, -2, math.nan, math.inf])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match="alpha must be finite and > 0"):
        make(problem()[0], alpha=alpha)


def test_bad_targets_and_dropout():
    with pytest.raises(ValueError, match="near names"):
        make(problem()[0], targets=["qq"])
    with pytest.raises(ValueError, match="target_modules must name"):
        ChainOfLoRA(problem()[0])
    with pytest.raises(ValueError, match="dropout"):
        make(problem()[0], dropout=1.0)


@pytest.mark.filterwarnings("ignore:link . has not trained")
def test_steps_out_of_turn():
    chain = make(problem()[0])
    for error in (RuntimeError, ValueError):
        with pytest.raises(error, match="extend must follow tie_knot"):
            chain.extend()
    chain.tie_knot()
    with pytest.raises(RuntimeError, match="tied already"):
        chain.tie_knot()
    with pytest.raises(RuntimeError, match="tied already"):
        fit_chain(chain, lambda *_: None, 4, ADAM)
    with pytest.raises(ValueError, match="ranks must be integers"):
        chain.extend(13)
    chain.extend()
    chain.unload()
    for step in (chain.tie_knot, chain.extend):
        with pytest.raises(RuntimeError, match=r"before unload|must follow"):
            step()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_factor_in_one_layer_leaves_all_weights_alone(value):
    model, _, loss = problem()
    chain = make(model)
    fit_chain(chain, loss, 3, ADAM, tie=False)
    model.v.B.data[0, 0] = value
    before = [model.q.base.weight.clone(), model.v.base.weight.clone()]
    with pytest.raises(ValueError, match="v must have finite factors"):
        chain.tie_knot()
    assert torch.equal(model.q.base.weight, before[0]) and torch.equal(model.v.base.weight, before[1])
    model.v.B.data[0, 0] = 0
    chain.tie_knot()


def test_names_tolerances_and_links_that_are_not_kept():
    chain = make(problem()[0], keep_links=False)
    with pytest.raises(ValueError, match=r"name must be one of \['q', 'v'\]"):
        chain.accumulated_rank("head")
    with pytest.raises(ValueError, match="tolerance"):
        chain.accumulated_rank("q", 0)
    with pytest.raises(RuntimeError, match="keep_links=True"):
        chain.delta_weight("q")


def test_restart_needs_equal_ranks():
    with pytest.raises(ValueError, match="ranks must be equal with tie=False"):
        fit_chain(make(problem()[0], (2, 1)), lambda *_: None, 4, ADAM, tie=False)


def test_tied_weights():
    model, _, _ = problem()
    model.v.weight = model.q.weight
    with pytest.raises(ValueError, match="tied"):
        make(model)
    chain = make(model, allow_tied=True, targets=["q"])
    nn.init.ones_(model.q.B)
    chain.tie_knot()
    assert model.q.base.weight is model.v.weight


# -------------------------------------------------------------------------------------------------- half precision


def test_half_precision_warns_and_a_master_copy_collects():
    gained = {}
    for master in (None, torch.float32):
        model, _, _ = problem(dtype=torch.bfloat16)
        nn.init.ones_(model.q.weight)
        if master is None:
            with pytest.warns(UserWarning, match="half an ulp vanishes"):
                chain = make(model, (1,) * 8, targets=["q"])
        else:
            chain = make(model, (1,) * 8, targets=["q"], master_dtype=master)
        for k in range(8):
            nn.init.ones_(model.q.A)
            nn.init.constant_(model.q.B, 1e-3)
            if master is None:
                with pytest.warns(UserWarning, match="100% of the updates"):
                    chain.tie_knot()
            else:
                chain.tie_knot()
            if k < 7:
                chain.extend()
        gained[master] = chain.unload().q.weight.float().mean().item() - 1
    assert gained[None] == 0 and gained[torch.float32] == pytest.approx(8e-3, abs=2**-8)


def test_a_knot_costs_one_rank_r_product_for_each_layer():
    from torch.utils.flop_counter import FlopCounterMode

    model, _, loss = problem()
    chain = make(model, (3,), keep_links=False)
    fit_chain(chain, loss, 2, ADAM, tie=False)
    with FlopCounterMode(display=False) as counter:
        chain.tie_knot()
    assert counter.get_total_flops() == 2 * (2 * 12 * 12 * 3)


def test_frozen_weights_cost_no_gradient():
    """Backward of a step: dx and the thin products, never dL/dW."""
    from torch.utils.flop_counter import FlopCounterMode

    model, _, loss = problem()
    chain, d, r, n = make(model, (2,)), 12, 2, 64
    value = loss(chain.model, 0)
    with FlopCounterMode(display=False) as counter:
        value.backward()
    thin = 2 * n * r * d
    assert counter.get_total_flops() == 2 * n * d * 3 + 2 * n * d * d + 3 * thin + 4 * thin
