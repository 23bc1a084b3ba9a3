"""One network, two tasks: segmentation and classification of the same images at once."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.transforms import BaseTransform
from mmengine.model import BaseModule
from mmengine.registry import MODELS, TRANSFORMS
from mmengine.structures import BaseDataElement, PixelData
from torch import Tensor

from ..options import check_int, checks_options

Config = dict[str, Any]


@MODELS.register_module()
@checks_options
class JointHead(BaseModule):
    """A segmentation and a classification head of MM on the features of one backbone.

    "Structurally different supervision flows through multiple heads" (paper, §3.2): both losses are
    summed, so one backward pass through the equilibrium serves both tasks.

    It is the head of mmpretrain's ``ImageClassifier``, which hands features and data samples to
    its head for losses and predictions alike. mmsegmentation's ``EncoderDecoder`` could train a
    second task as an ``auxiliary_head``, but asks only its decode head for predictions, and that
    for one map. Networks, losses, predictions and metrics stay those of the two projects: each
    head reads its own labels in the sample, ``gt_sem_seg`` and ``gt_score`` or ``gt_label``, and
    leaves its predictions there, where ``IoUMetric`` and the classification metrics look.

    Images are predicted whole; a flip at test time is not undone.

    Args:
        seg (dict): A decode head of mmsegmentation.
        cls (dict): A classification head of mmpretrain.
        cls_neck (dict | list[dict], optional): Brings the features to the shape that the
            classification head expects. The segmentation head selects its own.
        init_cfg (dict | list, optional): MM's initialization.
    """

    def __init__(
        self,
        seg: Config,
        cls: Config,
        cls_neck: Config | list[Config] | None = None,
        init_cfg: Config | list[Config] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        self.seg_head = MODELS.build(seg)
        self.cls_neck = None if cls_neck is None else MODELS.build(cls_neck)
        self.cls_head = MODELS.build(cls)

    def _cls_features(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return features if self.cls_neck is None else self.cls_neck(features)

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """[(N, Ci, Hi, Wi)] -> logits of the maps (N, K, H, W), and of the images (N, L)."""
        return self.seg_head(features), self.cls_head(self._cls_features(features))

    def loss(
        self, features: tuple[Tensor, ...], data_samples: Sequence[BaseDataElement]
    ) -> dict[str, Tensor]:
        """The losses of both tasks, named ``seg.*`` and ``cls.*``."""
        seg = self.seg_head.loss(features, data_samples, dict())
        cls = self.cls_head.loss(self._cls_features(features), data_samples)
        return {
            **{f'seg.{key}': value for key, value in seg.items()},
            **{f'cls.{key}': value for key, value in cls.items()},
        }

    def predict(
        self,
        features: tuple[Tensor, ...],
        data_samples: Sequence[BaseDataElement] | None = None,
    ) -> Sequence[BaseDataElement]:
        """Write ``pred_sem_seg``, ``pred_score`` and ``pred_label`` into the data samples.

        Raises:
            ValueError: Without data samples, which hold the size a map has to have.
        """
        if data_samples is None:
            raise ValueError(
                'JointHead.predict needs data_samples: their img_shape and ori_shape are the size '
                "of the map. Use mode='tensor' for logits without them."
            )
        metas = [sample.metainfo for sample in data_samples]
        maps = self.seg_head.predict(features, metas, dict())
        images = self.cls_head.predict(self._cls_features(features))
        for logits, meta, image, sample in zip(maps, metas, images, data_samples):
            sample.set_data(
                dict(
                    pred_sem_seg=PixelData(data=self._label_map(logits, meta)),
                    pred_score=image.pred_score,
                    pred_label=image.pred_label,
                )
            )
        return data_samples

    def _label_map(self, logits: Tensor, meta: dict[str, Any]) -> Tensor:
        """(K, H, W) of the padded image -> labels (1, H0, W0) of the image as it was read."""
        rows, columns = meta['img_shape'][:2]
        logits = F.interpolate(
            logits[None, :, :rows, :columns],
            size=tuple(meta['ori_shape'][:2]),
            mode='bilinear',
            align_corners=self.seg_head.align_corners,
        )
        return logits.argmax(dim=1)


@TRANSFORMS.register_module()
@checks_options
class PresentClasses(BaseTransform):
    """Multi-label classification from segmentation: the classes that a map contains.

    Put it after ``PackSegInputs``. It adds ``gt_score``, where mmpretrain's multi-label heads and
    metrics expect the labels, to the data sample. The labels are those of the crop that the network
    sees.

    Args:
        num_classes (int): Classes 0 to ``num_classes - 1`` count; higher labels of the map, such as
            a background in the last place and 255 for void, do not.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = check_int(type(self).__name__, 'num_classes', num_classes, 1)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Add ``gt_score``, (num_classes,) of 0 and 1, to ``results['data_samples']``."""
        sample = results.get('data_samples')
        if sample is None or 'gt_sem_seg' not in sample:
            raise ValueError(
                'PresentClasses found no packed segmentation map. Put it after PackSegInputs, '
                'with LoadAnnotations before that.'
            )
        labels = sample.gt_sem_seg.data
        labels = labels[labels < self.num_classes].long()
        counts = torch.bincount(labels, minlength=self.num_classes)
        sample.set_data(dict(gt_score=(counts > 0).float()))
        return results
