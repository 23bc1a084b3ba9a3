"""Training steps of each task by MM's own ways, mixed precision, SyncBN, checkpoints."""

import copy

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner import load_checkpoint, save_checkpoint
from torch.nn.modules.batchnorm import SyncBatchNorm

from tools import train

from ..checks import assert_finite
from ..mini_datasets import write_cityscapes, write_class_folders
from ..test_models import test_detection as detection
from ..test_models.test_detection import mmdet  # noqa: F401
from ..test_tools.test_train_test import CLASSIFIER, IN_PROCESS, SEGMENTOR
from . import assert_near, backbone, built, image, loss_of, on_gpu, small_config

ROWS, COLUMNS = 32, 48


def images(count=2):
    generator = torch.Generator().manual_seed(0)
    size = (3, ROWS, COLUMNS)
    return [torch.randint(0, 256, size, generator=generator).to(torch.uint8) for _ in range(count)]


def segmentation():
    """An initialized segmentor and a batch for it."""
    pytest.importorskip('mmseg.models')
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    cfg = small_config('mdeq_small_cityscapes')
    # The same on both devices.
    cfg.model.backbone.drop_rate = 0
    cfg.model.decode_head.update(in_channels=cfg.model.backbone.channels, channels=16)
    cfg.model.data_preprocessor.size = (ROWS, COLUMNS)
    samples = []
    for index in range(2):
        labels = torch.arange(ROWS * COLUMNS).view(1, ROWS, COLUMNS) // 100 + index
        meta = dict(img_shape=(ROWS, COLUMNS), ori_shape=(ROWS, COLUMNS))
        sample = SegDataSample(metainfo=meta)
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    return cfg, dict(inputs=images(), data_samples=samples)


def classification():
    """An initialized classifier and a batch for it."""
    pytest.importorskip('mmpretrain.models')
    from mmpretrain.structures import DataSample

    cfg = small_config('mdeq_small_imagenet')
    cfg.model.neck[0].update(
        in_channels=cfg.model.backbone.channels, head_channels=(8, 8, 8, 8), out_channels=32
    )
    cfg.model.head.update(in_channels=32, num_classes=10)
    samples = [DataSample().set_gt_label(label) for label in (1, 7)]
    return cfg, dict(inputs=torch.stack(images()), data_samples=samples)


TASKS = dict(segmentation=segmentation, classification=classification)
every_task = pytest.mark.parametrize('task', TASKS.values(), ids=TASKS)


def trained(cfg, data, device, steps=1, **wrapper):
    """A model after some steps of SGD, its losses, and the weights of f before and after."""
    model = built(cfg).to(device).train()
    before = [p.detach().clone() for p in model.backbone.cell.parameters()]
    optimizer = dict(type='SGD', lr=0.01)
    wrapper = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=optimizer) | wrapper)
    losses = []
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        for _ in range(steps):
            losses.append(model.train_step(copy.deepcopy(data), wrapper)['loss'])
    assert {p.device.type for p in model.parameters()} == {torch.device(device).type}
    return model, torch.stack(losses), before


def check_moved(model, before, still=()):
    """Every parameter of f is finite and has changed; those named ``still`` may be as before."""
    for (name, p), old in zip(model.backbone.cell.named_parameters(), before, strict=True):
        assert torch.isfinite(p).all(), name
        assert name.endswith(still) or not torch.equal(p, old), name


@every_task
def test_a_training_step_gives_the_loss_and_weights_of_the_cpu(task, device):
    cfg, data = task()
    model, losses, before = trained(cfg, data, device)
    check_moved(model, before)
    exact, wanted, _ = trained(cfg, data, 'cpu')
    assert_near([losses], [wanted], 1e-4)
    assert_near(list(model.parameters()), list(exact.parameters()), 1e-3)


@on_gpu
@every_task
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_a_training_step_in_mixed_precision(task, dtype):
    cfg, data = task()
    wanted = trained(cfg, data, 'cuda')[1]
    # The first steps of a scaled loss may overflow; they are left out and the scale is halved.
    amp = dict(type='AmpOptimWrapper', dtype=dtype, loss_scale='dynamic')
    seen = []
    original = torch.nn.Conv2d.forward

    def forward(conv, x):
        out = original(conv, x)
        seen.append(out.dtype)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Conv2d, 'forward', forward)
        model, losses, before = trained(cfg, data, 'cuda', steps=12, **amp)
    assert getattr(torch, dtype) in seen
    assert_near([losses[0]], [wanted[0]], 0.02)
    assert_finite(losses)
    check_moved(model, before)


def test_a_training_step_of_a_detector(mmdet, device):  # noqa: F811
    cfg = detection.config()
    model = built(cfg).to(device).train()
    before = [p.detach().clone() for p in model.backbone.cell.parameters()]
    optimizer = dict(type='SGD', lr=0.01)
    wrapper = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=optimizer))
    losses = model.train_step(detection.samples(), wrapper)
    assert_finite(losses)
    # The norm behind the first convolution cancels its gain, whose gradient is rounding.
    check_moved(model, before, still=('conv1.parametrizations.weight.original0',))


RUNS = dict(seg=SEGMENTOR, cls=CLASSIFIER)


@on_gpu
@pytest.mark.parametrize('amp', [[], ['--amp']], ids=['float32', 'amp'])
@pytest.mark.parametrize('name', RUNS)
def test_tools_train_and_validate(name, amp, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f'{name}.py').write_text(RUNS[name])
    options = ['--cfg-options', *IN_PROCESS]
    if name == 'seg':
        options += [f'data_root={write_cityscapes(tmp_path / "data")}', 'crop_size=(32,64)']
    else:
        counts = dict(train=2, test=1)
        options.append(f'data_root={write_class_folders(tmp_path / "data", counts)}')
    runner = train.main([f'{name}.py', *amp, *options])
    scalars = runner.message_hub.log_scalars
    metric = dict(seg='val/mIoU', cls='val/accuracy/top1')[name]
    assert 0 <= scalars[metric].current() <= 100
    assert_finite(torch.tensor(scalars['train/loss'].data[0]))
    assert {p.device.type for p in runner.model.parameters()} == {'cuda'}


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    meeting = f'file://{tmp_path}/meeting'
    torch.distributed.init_process_group('nccl', init_method=meeting, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@on_gpu
def test_syncbn_of_one_process_is_batch_norm(one_process):
    cfg, data = segmentation()
    alone, wanted, _ = trained(cfg, data, 'cuda')
    model = built(cfg, sync=True).cuda().train()
    assert any(isinstance(module, SyncBatchNorm) for module in model.modules())
    device = torch.cuda.current_device()
    shared = MMDistributedDataParallel(model, device_ids=[device], broadcast_buffers=False)
    optimizer = dict(type='SGD', lr=0.01)
    wrapper = build_optim_wrapper(shared, dict(type='OptimWrapper', optimizer=optimizer))
    loss = shared.train_step(copy.deepcopy(data), wrapper)['loss']
    assert_near([loss], [wanted[0]], 1e-4)
    assert_near(model.state_dict(), alone.state_dict(), 1e-3)


def test_a_checkpoint_goes_to_a_device_and_back_unchanged(device, tmp_path):
    cfg, data = segmentation()
    start = built(cfg)
    save_checkpoint(dict(state_dict=start.state_dict()), str(tmp_path / 'cpu.pth'))
    there = built(cfg).to(device)
    for p in there.parameters():
        p.data.add_(1)
    load_checkpoint(there, str(tmp_path / 'cpu.pth'), map_location=device)
    x = image(device, size=32)
    with torch.no_grad():
        assert_near(there.eval().backbone(x), start.eval().backbone(x.cpu()), 1e-3)
    save_checkpoint(dict(state_dict=there.state_dict()), str(tmp_path / 'there.pth'))
    back = built(cfg)
    load_checkpoint(back, str(tmp_path / 'there.pth'), map_location='cpu')
    wanted = start.state_dict()
    assert back.state_dict().keys() == wanted.keys()
    for name, value in back.state_dict().items():
        assert value.device.type == 'cpu' and torch.equal(value, wanted[name]), name


def test_an_optimizer_goes_on_on_another_device(device, tmp_path):
    """Adam's moments belong to the weights they came with."""

    def step(net, optimizer, x):
        optimizer.zero_grad()
        loss_of(net(x)).backward()
        optimizer.step()

    nets = {where: backbone(where, torch.float64) for where in ('cpu', device)}
    optimizers = {key: torch.optim.Adam(net.parameters(), 1e-3) for key, net in nets.items()}
    for where, net in nets.items():
        step(net, optimizers[where], image(where, dtype=torch.float64))
    path = tmp_path / 'there.pth'
    torch.save([nets[device].state_dict(), optimizers[device].state_dict()], path)
    weights, moments = torch.load(path, map_location='cpu', weights_only=True)
    net = backbone('cpu', torch.float64)
    net.load_state_dict(weights)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    optimizer.load_state_dict(moments)
    for model, algorithm in ((net, optimizer), (nets['cpu'], optimizers['cpu'])):
        step(model, algorithm, image('cpu', dtype=torch.float64))
    assert_near(net.state_dict(), nets['cpu'].state_dict(), 1e-6)
