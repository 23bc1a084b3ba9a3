"""Scripts that mmsegmentation and mmpretrain bring with them, on configs of this repository."""

import re
import runpy
import sys
from pathlib import Path

import cv2
import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mdeq_mm.apis import build_model
from mdeq_mm.model_index import packaged_weights

from ..grad_cam import provide_grad_cam
from ..mini_datasets import write_class_folders

REPO = Path(__file__).resolve().parents[2]
DIGITS = str(REPO / 'configs/mdeq_tiny_digits.py')
NATIVE = ['--cfg-options', 'model.backbone.norm_kernel=native']


@pytest.fixture
def grad_cam(monkeypatch):
    provide_grad_cam(monkeypatch)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script of a project's tools; what it printed."""

    def run(project, script, *arguments):
        path = Path(pytest.importorskip(project).__file__).parent / '.mim/tools' / script
        monkeypatch.setattr(sys, 'argv', [str(path), *map(str, arguments)])
        monkeypatch.setattr(DefaultScope, '_instance_dict', type(DefaultScope._instance_dict)())
        runpy.run_path(str(path), run_name='__main__')
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    'layers, names',
    [
        ([], ['the last norm layer "backbone.outputs.1"']),
        (['--target-layers', 'backbone.outputs.0'], []),
        (['--target-layers', 'backbone.outputs.0', 'backbone.outputs.1'], []),
    ],
)
def test_class_activation_maps(run, grad_cam, tmp_path, layers, names):
    write_class_folders(tmp_path / 'digits', dict(test=1))
    image, out = tmp_path / 'digits/test/3/3_0.png', tmp_path / 'cam.png'
    weights = packaged_weights()['mdeq_tiny_digits']
    arguments = [image, DIGITS, weights, '--save-path', out, *layers, *NATIVE]
    printed = run('mmpretrain', 'visualization/vis_cam.py', *arguments)
    assert all(name in printed for name in names)
    assert cv2.imread(str(out)).shape == (16, 16, 3)


def parameters(config):
    model = build_model(Config.fromfile(config))
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    'project, config, shape',
    [('mmpretrain', DIGITS, [16]), ('mmseg', str(REPO / 'configs/mdeq_small_camvid.py'), [64, 32])],
)
def test_operations_and_parameters(run, project, config, shape):
    shape = ['--shape', *map(str, shape)]
    try:
        printed = run(project, 'analysis_tools/get_flops.py', config, *shape)
    except ValueError as error:
        # As that of mmsegmentation 1.2.2 does, for whichever model.
        if str(error) != '"input_shape" and "inputs" cannot be both set.':
            raise
        pytest.skip('this get_flops.py gives mmengine what it refuses')
    found = dict(re.findall(r'^(Flops|Params): ([\d.]+)[MG]', printed, re.MULTILINE))
    # Printed in millions, with three digits behind the point.
    assert float(found['Params']) == pytest.approx(parameters(config) / 1e6, abs=6e-4)
    assert float(found['Flops']) > 0
