"""Habits of users of mmsegmentation and mmpretrain: what works with a ResNet works with an MDEQ."""

import copy
import os

import cv2
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer

from mdeq_mm import register_models

from ..mini_datasets import write_cityscapes, write_class_folders

pytest.importorskip('mmseg')
pytest.importorskip('mmpretrain')

SOLVER = dict(type='Anderson', max_iter=3)
NETS = dict(
    MDEQ=dict(
        type='MDEQBackbone',
        channels=(8, 16),
        expansion=1,
        stem_strides=(2,),
        norm_cfg=dict(type='GN', num_groups=4),
        solver=SOLVER,
        gradient=dict(type='ImplicitGradient', solver=SOLVER),
    ),
    ResNet=dict(
        type='mmpretrain.ResNet',
        depth=18,
        num_stages=2,
        strides=(1, 2),
        dilations=(1, 1),
        out_indices=(0, 1),
        stem_channels=8,
        base_channels=8,
    ),
)
HOOKS = dict(logger=dict(type='LoggerHook', interval=1), checkpoint=dict(type='CheckpointHook'))


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    write_cityscapes(root / 'cityscapes', num_train=2, num_val=1)
    write_class_folders(root / 'digits', dict(train=1, test=1))
    return root


@pytest.fixture(autouse=True)
def own_process_state(tmp_path, monkeypatch):
    """What MM keeps for a whole process, by name, is that of each test alone."""
    monkeypatch.chdir(tmp_path)
    for manager in (MMLogger, MessageHub, DefaultScope, Visualizer):
        monkeypatch.setattr(manager, '_instance_dict', type(manager._instance_dict)())


@pytest.fixture(params=NETS)
def net(request):
    return copy.deepcopy(NETS[request.param])


def classifier(data, net):
    def loader(split):
        return dict(
            batch_size=5,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=split == 'train'),
            collate_fn=dict(type='default_collate'),
            dataset=dict(
                type='CustomDataset',
                data_root=str(data / 'digits'),
                data_prefix=split,
                pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
            ),
        )

    head = dict(type='LinearClsHead', in_channels=16, num_classes=10, topk=(1,))
    preprocessor = dict(mean=[76.5] * 3, std=[89.25] * 3, num_classes=10)
    return Config(
        dict(
            default_scope='mmpretrain',
            work_dir='run',
            default_hooks=HOOKS,
            model=dict(
                type='ImageClassifier',
                data_preprocessor=dict(type='ClsDataPreprocessor', **preprocessor),
                backbone=net,
                neck=dict(type='GlobalAveragePooling'),
                head=dict(head, loss=dict(type='CrossEntropyLoss')),
            ),
            train_dataloader=loader('train'),
            val_dataloader=loader('test'),
            test_dataloader=loader('test'),
            val_evaluator=dict(type='Accuracy', topk=(1,)),
            test_evaluator=dict(type='Accuracy', topk=(1,)),
            train_cfg=dict(by_epoch=True, max_epochs=1),
            val_cfg=dict(),
            test_cfg=dict(),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
            visualizer=dict(
                type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')]
            ),
        )
    )


def segmentor(data, net):
    def loader(split):
        return dict(
            batch_size=2 if split == 'train' else 1,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=dict(
                type='CityscapesDataset',
                data_root=str(data / 'cityscapes'),
                data_prefix=dict(img_path=f'leftImg8bit/{split}', seg_map_path=f'gtFine/{split}'),
                pipeline=[
                    dict(type='LoadImageFromFile'),
                    dict(type='LoadAnnotations'),
                    dict(type='PackSegInputs'),
                ],
            ),
        )

    preprocessor = dict(mean=[120.0] * 3, std=[60.0] * 3, bgr_to_rgb=True, size=(64, 128))
    return Config(
        dict(
            default_scope='mmseg',
            work_dir='run',
            default_hooks=dict(copy.deepcopy(HOOKS)),
            model=dict(
                type='EncoderDecoder',
                data_preprocessor=dict(type='SegDataPreProcessor', seg_pad_val=255, **preprocessor),
                backbone=net,
                decode_head=seg_head(),
                train_cfg=dict(),
                test_cfg=dict(mode='whole'),
            ),
            train_dataloader=loader('train'),
            val_dataloader=loader('val'),
            test_dataloader=loader('val'),
            val_evaluator=dict(type='IoUMetric'),
            test_evaluator=dict(type='IoUMetric'),
            train_cfg=dict(by_epoch=True, max_epochs=1),
            val_cfg=dict(),
            test_cfg=dict(),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
            visualizer=dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')]),
        )
    )


def seg_head(**options):
    head = dict(
        type='FCNHead',
        in_channels=16,
        in_index=1,
        channels=8,
        num_convs=1,
        num_classes=19,
        norm_cfg=dict(type='BN'),
        loss_decode=dict(type='CrossEntropyLoss'),
    )
    return dict(head, **options)


def train(cfg):
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def wrap(loader, kind, **options):
    inner = loader.dataset
    several = dict(datasets=[inner, copy.deepcopy(inner)])
    key = several if kind == 'ConcatDataset' else dict(dataset=inner)
    loader.dataset = dict(type=kind, **key, **options)


def repeated(cfg):
    wrap(cfg.train_dataloader, 'RepeatDataset', times=2)


def concatenated(cfg):
    wrap(cfg.train_dataloader, 'ConcatDataset')


def class_balanced(cfg):
    wrap(cfg.train_dataloader, 'ClassBalancedDataset', oversample_thr=0.3)


def folds(cfg):
    wrap(cfg.train_dataloader, 'KFoldDataset', fold=0, num_splits=2)


def mixed_batches(cfg):
    augments = [dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]
    cfg.model.train_cfg = dict(augments=augments)
    cfg.model.head.loss = dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')


def another_recipe_after_an_epoch(cfg):
    augments = [dict(type='Mixup', alpha=0.8)]
    loss = dict(type='LabelSmoothLoss', label_smooth_val=0.1)
    switch = dict(action_epoch=1, train_augments=augments, loss=loss)
    cfg.train_cfg.max_epochs = 2
    cfg.custom_hooks = [dict(type='SwitchRecipeHook', schedule=[switch])]


def averages_of_weights(cfg):
    cfg.custom_hooks = [dict(type='EMAHook', ema_type='StochasticWeightAverage')]


def precise_batch_norm(cfg):
    cfg.custom_hooks = [dict(type='PreciseBNHook', num_samples=10), dict(type='EmptyCacheHook')]


def early_stop(cfg):
    cfg.custom_hooks = [dict(type='EarlyStoppingHook', monitor='accuracy/top1')]


def profile(cfg):
    ready = dict(type='log_trace', sort_by='self_cpu_time_total')
    hook = dict(type='ProfilerHook', by_epoch=False, profile_times=1, on_trace_ready=ready)
    cfg.custom_hooks = [hook]


def deterministic(cfg):
    cfg.randomness = dict(seed=0, deterministic=True)


def truncated_normal(cfg):
    cfg.model.backbone.init_cfg = [
        dict(type='TruncNormal', layer=['Conv2d', 'Linear'], std=0.02, bias=0.0),
        dict(type='Constant', layer=['GroupNorm', 'BatchNorm2d'], val=1.0, bias=0.0),
    ]


def generalized_mean(cfg):
    cfg.model.neck = dict(type='GeneralizedMeanPooling')


def a_hidden_layer_in_the_head(cfg):
    cfg.model.head = dict(
        type='StackedLinearClsHead',
        in_channels=16,
        num_classes=10,
        mid_channels=[8],
        act_cfg=dict(type='ReLU'),
    )


@pytest.mark.parametrize(
    'habit',
    [
        repeated,
        concatenated,
        class_balanced,
        folds,
        mixed_batches,
        another_recipe_after_an_epoch,
        averages_of_weights,
        precise_batch_norm,
        early_stop,
        profile,
        deterministic,
        truncated_normal,
        generalized_mean,
        a_hidden_layer_in_the_head,
    ],
)
def test_classification(data, net, habit):
    cfg = classifier(data, net)
    habit(cfg)
    try:
        runner = train(cfg)
    finally:
        torch.use_deterministic_algorithms(False)
    assert os.path.isfile(f'run/epoch_{runner.epoch}.pth') and runner.epoch >= 1
    assert all(p.isfinite().all() for p in runner.model.parameters())


def heads_at_each_scale(cfg):
    loss = dict(type='CrossEntropyLoss', loss_weight=0.4)
    widths = enumerate((8, 16))
    cfg.model.auxiliary_head = [
        seg_head(in_channels=width, in_index=i, loss_decode=loss) for i, width in widths
    ]


def a_pyramid(cfg):
    cfg.model.neck = dict(type='FPN', in_channels=[8, 16], out_channels=8, num_outs=2)
    cfg.model.decode_head = seg_head(
        type='FPNHead', in_channels=[8, 8], in_index=[0, 1], feature_strides=[4, 8], num_convs=None
    )
    cfg.model.decode_head.pop('num_convs')


def sliding_windows(cfg):
    cfg.model.test_cfg = dict(mode='slide', crop_size=(32, 32), stride=(20, 20))


def padded_tests(cfg):
    cfg.model.data_preprocessor.test_cfg = dict(size_divisor=48)


def no_label_zero(cfg):
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        dataset.update(type='BaseSegDataset', reduce_zero_label=True)
        dataset.update(img_suffix='_leftImg8bit.png', seg_map_suffix='_gtFine_labelTrainIds.png')
        dataset.metainfo = dict(classes=[f'class {i}' for i in range(19)])
        dataset.pipeline[1].reduce_zero_label = True


def some_classes(cfg):
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=('road', 'car', 'sky'))
    cfg.model.decode_head.num_classes = 3


def one_logit_of_two_classes(cfg):
    some_classes(cfg)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=('road', 'car'))
    loss = dict(type='CrossEntropyLoss', use_sigmoid=True)
    cfg.model.decode_head.update(num_classes=2, out_channels=1, threshold=0.3, loss_decode=loss)


def grey_images(cfg):
    cfg.model.backbone.in_channels = 1
    cfg.model.data_preprocessor.update(mean=[120.0], std=[60.0], bgr_to_rgb=False)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.pipeline[0].color_type = 'grayscale'


def several_metrics(cfg):
    cfg.val_evaluator = [dict(type='IoUMetric'), dict(type='IoUMetric', prefix='other')]


@pytest.mark.parametrize(
    'habit',
    [
        heads_at_each_scale,
        a_pyramid,
        sliding_windows,
        padded_tests,
        no_label_zero,
        some_classes,
        one_logit_of_two_classes,
        grey_images,
        several_metrics,
    ],
)
def test_segmentation(data, net, habit):
    cfg = segmentor(data, net)
    habit(cfg)
    runner = train(cfg)
    assert 'mIoU' in str(sorted(runner.message_hub.log_scalars))
    assert all(p.isfinite().all() for p in runner.model.parameters())


def _projector(**options):
    neck = dict(type='NonLinearNeck', in_channels=16, hid_channels=8, out_channels=8)
    return dict(neck, **{'with_avg_pool': True, **options})


PREDICTOR = dict(in_channels=8, with_avg_pool=False, with_last_bn=False)
LATENT = dict(
    type='LatentPredictHead',
    loss=dict(type='CosineSimilarityLoss'),
    predictor=_projector(**PREDICTOR),
)
CONTRAST = dict(type='ContrastiveHead', loss=dict(type='CrossEntropyLoss'), temperature=0.2)
MOCO_NECK = dict(in_channels=16, hid_channels=8, out_channels=8)
SELF_SUPERVISED = dict(
    MoCo=dict(
        neck=dict(type='MoCoV2Neck', with_avg_pool=True, **MOCO_NECK),
        head=CONTRAST,
        queue_len=20,
        feat_dim=8,
        momentum=0.01,
    ),
    DenseCL=dict(
        neck=dict(type='DenseCLNeck', **MOCO_NECK),
        head=CONTRAST,
        queue_len=20,
        feat_dim=8,
        momentum=0.01,
    ),
    SimCLR=dict(neck=_projector(), head=CONTRAST),
    BYOL=dict(neck=_projector(), head=LATENT, base_momentum=0.01),
    SimSiam=dict(neck=_projector(num_layers=3), head=LATENT),
    BarlowTwins=dict(
        neck=_projector(num_layers=3, with_last_bn=False),
        head=dict(
            type='LatentCrossCorrelationHead',
            in_channels=8,
            loss=dict(type='CrossCorrelationLoss'),
        ),
    ),
)


@pytest.mark.parametrize('kind', SELF_SUPERVISED)
def test_self_supervision(data, net, kind):
    """Their necks take one map, so that the backbone returns its last scale alone."""
    cfg = classifier(data, dict(net, out_indices=(1,)))
    cfg.model = dict(
        type=kind,
        backbone=cfg.model.backbone,
        data_preprocessor=dict(type='SelfSupDataPreprocessor', mean=[0.0] * 3, std=[255.0] * 3),
        **copy.deepcopy(SELF_SUPERVISED[kind]),
    )
    views = [[dict(type='RandomResizedCrop', scale=16)]]
    cfg.train_dataloader.dataset.pipeline.insert(
        1, dict(type='MultiView', num_views=2, transforms=views)
    )
    for part in ('dataloader', 'cfg', 'evaluator'):
        cfg.pop(f'val_{part}')
        cfg.pop(f'test_{part}')
    runner = train(cfg)
    assert all(p.isfinite().all() for p in runner.model.parameters())


def decays(runner):
    """Learning rate and weight decay of each parameter, by name."""
    names = {id(p): name for name, p in runner.model.named_parameters()}
    groups = runner.optim_wrapper.optimizer.param_groups
    return {names[id(p)]: (g['lr'], g['weight_decay']) for g in groups for p in g['params']}


def test_no_decay_of_norms_and_biases_and_a_rate_of_its_own_for_the_backbone(data, net):
    cfg = classifier(data, net)
    cfg.optim_wrapper.optimizer = dict(type='AdamW', lr=0.01, weight_decay=0.05)
    cfg.optim_wrapper.paramwise_cfg = dict(norm_decay_mult=0.0, bias_decay_mult=0.0)
    found = decays(train(cfg))
    affine = [k for k in found if k.endswith('bias') or 'norm' in k or '.bn' in k]
    assert len(affine) > 6 and not any(found[name][1] for name in affine)
    assert found['head.fc.weight'][1] == 0.05
    assert sum(decay == 0.05 for _, decay in found.values()) > 3

    cfg.optim_wrapper.paramwise_cfg = dict(custom_keys={'backbone': dict(lr_mult=0.1)})
    found = decays(train(cfg))
    rates = {name.split('.')[0]: rate for name, (rate, _) in found.items()}
    assert rates == pytest.approx(dict(backbone=0.001, head=0.01))


def test_training_goes_on_with_another_batch_size(data, net):
    cfg = classifier(data, net)
    train(copy.deepcopy(cfg))
    cfg.resume, cfg.train_cfg.max_epochs = True, 2
    cfg.train_dataloader.batch_size = 2
    runner = train(cfg)
    # Two batches of five, then five of two.
    assert (runner.epoch, runner.iter) == (2, 7)


def test_a_classifiers_backbone_begins_a_segmentor(data, net):
    trained = train(classifier(data, net)).model.backbone.state_dict()
    cfg = segmentor(data, net)
    weights = dict(type='Pretrained', checkpoint='run/epoch_1.pth', prefix='backbone.')
    cfg.model.backbone.init_cfg = weights
    runner = Runner.from_cfg(cfg)
    runner.model.init_weights()
    found = runner.model.backbone.state_dict()
    assert all(torch.equal(found[key], trained[key]) for key in found)
    cfg.model.backbone.init_cfg.prefix = 'bockbone.'
    with pytest.raises(AssertionError, match='bockbone. is not in the pretrained model'):
        Runner.from_cfg(cfg).model.init_weights()


def test_frozen_parts_keep_their_weights(data):
    for stages in (0, 1, 2):
        cfg = classifier(data, dict(NETS['MDEQ'], frozen_stages=stages, norm_eval=True))
        model = train(cfg).model
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        parts = {name.split('.')[1] for name in frozen}
        assert parts == {'stem', 'injection', 'cell'} & set(
            ('stem', 'injection', 'cell')[: stages + 1]
        )
        assert all(p.grad is None for n, p in model.named_parameters() if n in frozen)


def test_stages_of_a_resnet_are_answered_by_those_of_an_mdeq():
    with pytest.raises(ValueError, match=r'0 \(stem\), 1 \(injection as well\) or 2 .* got 4'):
        MODELS.build(dict(NETS['MDEQ'], frozen_stages=4))


def test_apis_of_mmpretrain(data, net):
    apis = pytest.importorskip('mmpretrain')
    cfg = classifier(data, net)
    train(copy.deepcopy(cfg))
    image = str(data / 'digits/test/1/1_0.png')
    model = apis.get_model(cfg, pretrained='run/epoch_1.pth')
    by_file = apis.ImageClassificationInferencer(model)([image, image], batch_size=2)
    by_array = apis.ImageClassificationInferencer(model)(cv2.imread(image), show_dir='shown')
    assert by_file[0]['pred_label'] == by_array[0]['pred_label']
    features = apis.FeatureExtractor(model)
    assert [tuple(f.shape)[:1] for f in features(image, stage='backbone')[0]] == [(8,), (16,)]
    assert [tuple(f.shape) for f in features(image)[0]] == [(8,), (16,)]
    last = apis.get_model(cfg, head=None, backbone=dict(out_indices=(1,)))
    assert len(last.extract_feat(torch.rand(1, 3, 16, 16))) == 1


def test_a_registered_name_is_enough_for_inference(data):
    apis = pytest.importorskip('mmpretrain')
    register_models()
    image = str(data / 'digits/test/1/1_0.png')
    label = apis.inference_model('mdeq_tiny_digits', image)['pred_label']
    again = apis.ImageClassificationInferencer('mdeq_tiny_digits')(image)
    assert again[0]['pred_label'] == label


def test_apis_of_mmseg(data, net):
    from mmseg.apis import MMSegInferencer, inference_model, init_model, show_result_pyplot

    cfg = segmentor(data, net)
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    train(copy.deepcopy(cfg))
    cfg.dump('seg.py')
    image = str(next((data / 'cityscapes/leftImg8bit/val/lindau').iterdir()))
    model = init_model(cfg, 'run/epoch_1.pth', device='cpu')
    found = inference_model(model, image)
    from_array = inference_model(model, cv2.imread(image))
    assert torch.equal(found.pred_sem_seg.data, from_array.pred_sem_seg.data)
    show_result_pyplot(model, image, found, show=False, out_file='painted.png')
    inferencer = MMSegInferencer(model='seg.py', weights='run/epoch_1.pth', device='cpu')
    inferencer([image, image], batch_size=2, out_dir='shown')
    assert os.path.isfile('painted.png') and os.listdir('shown/vis')
