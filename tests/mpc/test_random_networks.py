"""Random networks: executed as `plain` does and for what was predicted, or refused by the name of an op."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from generated import cnns
from tightrope.errors import InputError, TraceError
from tightrope.lower import lower
from tightrope.runtimes.mpc import MPC, compile_program, costs, oracle
from tightrope.runtimes.plain import evaluate, ranges

CONFIGS = [
    MPC(noise_bits=0),
    MPC(noise_bits=0, fraction_bits=16, weight_bits=10),
    MPC(noise_bits=0, ring_bits=32, fraction_bits=10, weight_bits=11, margin=2.0),
    MPC(reveal="label"),
]


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(cnns(), st.sampled_from(CONFIGS))
def test_a_random_network_runs_as_predicted_or_is_refused_by_name(case, config: MPC) -> None:
    model, shape = case
    x = torch.randn(3, *shape)
    program = ranges(lower(model, shape), [x])
    output = program.shape(program.output)
    if len(output) != 1 or output[0] < 2:
        config = CONFIGS[0]  # it has no label
    lacking = [op for op in program.ops if op.kind not in MPC.ops]
    try:
        schedule = compile_program(program, config)
    except TraceError as error:
        assert any(f"where:   {op.name}\n" in str(error) and op.kind in str(error) for op in lacking)
        return
    except InputError:
        assert config.ring_bits == 32  # has no room for large values
        return
    want, model_output = evaluate(program, x).numpy(), oracle.evaluate(program, schedule, x.numpy())
    with config.open(program, "simulate") as session:
        got, measured = session.run(x.numpy())
    if config.reveal == "logits":
        bound = 64 * 2.0 ** (-config.weight_bits + 4) * max(1.0, *program.ranges.values())
        assert np.abs(got - want).max() < bound and np.abs(model_output - want).max() < bound
    else:
        taken = (got * want).sum(1)
        assert (want.max(1) - taken < 2**-12 * max(1.0, *program.ranges.values())).all()
    predicted = costs(program, config, 3)
    assert (measured.links, measured.offline_links) == (predicted.links, predicted.offline_links)
    assert measured.total.rounds == predicted.total.rounds
    assert measured.total.drelus == predicted.total.drelus
    if config.reveal == "logits":  # a label's tournament has no price before it is asked for
        prices = config.prices(program)
        assert {name: 3 * p.drelus for name, p in prices.items()} == {
            name: cost.drelus for name, cost in predicted.ops.items()
        }
