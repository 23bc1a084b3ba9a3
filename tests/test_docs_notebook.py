"""docs/digits.ipynb: its cells run in order, and the net learns."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / 'docs/digits.ipynb'


def test_the_notebook_trains_a_net_that_needs_several_evaluations():
    pytest.importorskip('sklearn')
    cells = [c for c in json.loads(NOTEBOOK.read_text())['cells'] if c['cell_type'] == 'code']
    assert len(cells) >= 4 and not any(cell['outputs'] for cell in cells)
    names = {}
    for cell in cells:
        exec(compile(''.join(cell['source']), NOTEBOOK.name, 'exec'), names)
    losses, accuracy = names['losses'], names['accuracy']
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert accuracy[6] > 0.7 and accuracy[6] > accuracy[1]
