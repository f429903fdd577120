"""The frequencies of rotary tables, found in the tables alone."""

import pytest
import torch

from scalebits_compiler.passes.canonicalize.rotary_tables import TableForm, frequency_of, scaling_of


def tables(frequency, positions, form):
    """(cos, sin) [1, positions, 1, d] as a model makes them, in float32."""
    angles = torch.arange(positions).float()[:, None] * frequency
    angles = angles.repeat_interleave(2, 1) if form.interleaved else angles.repeat(1, 2)
    return torch.cos(angles)[None, :, None], torch.sin(angles)[None, :, None]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_frequencies_of_a_table_are_found_to_the_last_bit_that_counts(interleaved, base):
    form = TableForm(interleaved, heads=2)
    frequency = base ** -(torch.arange(0, 64, 2).float() / 64)
    cos, sin = tables(frequency, 2048, form)
    found = frequency_of(cos, sin, form)
    assert found is not None
    torch.testing.assert_close(found, frequency, rtol=3e-7, atol=0)
    assert scaling_of(cos, sin, found, form) == 1.0


def test_other_tables_have_no_frequency():
    form = TableForm(True, heads=2)
    cos, sin = tables(torch.tensor([1.0, 0.1]), 64, form)
    assert frequency_of(cos, -sin, form) is None  # turns the other way
    bent = torch.cat((sin[:, :32], sin[:, 32:] * 0.5), 1)
    found = frequency_of(cos, bent, form)
    assert found is None or scaling_of(cos, bent, found, form) is None
