import pytest

from hif4c.passes.choose_precision import choose_precision
from hif4c.passes.mark_boundaries import mark_boundaries
from hif4c.passes.program import Decision, Precision
from tests.passes.builder import Builder


def two_linears():
    build = Builder(x=(2, 64))
    hidden = build.linear(build.inputs[0], "blocks.0.ffn.net.2", 64)
    program = build.finish(build.linear(hidden, "proj_out", 8))
    mark_boundaries(program)
    return program


PLAN = [
    Decision("proj_out", Precision.HIGH, "boundary: output projection"),
    Decision("blocks.0.ffn.net.2", Precision.W4A4, "block linear"),
]


def test_records_the_plan_in_graph_order():
    program = two_linears()
    result = choose_precision(program, PLAN)
    assert result.changed
    assert result.notes == ["1 linears high", "1 linears w4a4"]
    assert list(program.decisions.values()) == [PLAN[1], PLAN[0]]


def test_refuses_a_plan_for_other_linears():
    program = two_linears()
    plan = [PLAN[0], Decision("blocks.7.ffn.net.2", Precision.W4A4, "block linear")]
    with pytest.raises(ValueError, match=r"only planned \['blocks.7.ffn.net.2'\].*graph \['blocks.0.ffn.net.2'\]"):
        choose_precision(program, plan)


@pytest.mark.parametrize("precision", [Precision.W4A4, Precision.W4A16])
def test_refuses_to_quantize_a_boundary(precision):
    program = two_linears()
    plan = [Decision("proj_out", precision, "greedy"), PLAN[1]]
    with pytest.raises(ValueError, match="quantizes proj_out, which lies in a boundary region"):
        choose_precision(program, plan)
    assert program.decisions == {}
