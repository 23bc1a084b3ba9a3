"""What mmpretrain's vis_cam.py takes of the package grad-cam, for where that is not installed."""

import importlib
import sys
from types import ModuleType

import cv2
import numpy as np
import torch
from torch import nn


class GradCAM:
    """Gradients, averaged over the map, weigh the channels of an activation."""

    def __init__(self, model, target_layers, use_cuda=False):
        self.model, self.target_layers = model, target_layers
        self.activations_and_grads = ActivationsAndGradients(model, target_layers, None)

    def __call__(self, images, targets, **options):
        watched = self.activations_and_grads
        self.model.zero_grad()
        scores = self.model(images)
        # Of the class with the highest score.
        scores.max(dim=1).values.sum().backward()
        maps = []
        for activation, gradient in zip(watched.activations, watched.gradients[::-1]):
            weights = gradient.mean(dim=(2, 3), keepdim=True)
            maps.append((weights * activation).sum(1, keepdim=True).relu())
        size = images.shape[2:]
        maps = [nn.functional.interpolate(m / (m.max() + 1e-7), size) for m in maps]
        return torch.cat(maps, 1).mean(1).detach().numpy()


class ActivationsAndGradients:
    """As grad-cam: every call of a layer adds to what it keeps."""

    def __init__(self, model, target_layers, reshape_transform):
        self.activations, self.gradients = [], []
        self.handles = [layer.register_forward_hook(self.keep) for layer in target_layers]

    def keep(self, module, args, out):
        self.activations.append(out.detach().clone())
        if out.requires_grad:
            out.register_hook(lambda gradient: self.gradients.append(gradient.detach()))

    def release(self):
        for handle in self.handles:
            handle.remove()


def show_cam_on_image(image, mask, use_rgb):
    painted = cv2.applyColorMap(np.uint8(255 * mask), cv2.COLORMAP_JET)
    return np.uint8(255 * (image / 2 + np.float32(painted) / 510))


def provide_grad_cam(monkeypatch):
    """Let a test import ``pytorch_grad_cam``: the installed one, or else what stands for it."""
    try:
        importlib.import_module('pytorch_grad_cam')
        return
    except ImportError:
        pass
    names = ('', '.base_cam', '.activations_and_gradients', '.utils', '.utils.image')
    modules = {name: ModuleType(f'pytorch_grad_cam{name}') for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f'pytorch_grad_cam{name}', module)
    modules[''].GradCAMPlusPlus = GradCAM
    modules[''].base_cam = modules['.base_cam']
    modules['.base_cam'].BaseCAM = type('BaseCAM', (), {})
    modules[''].GradCAM = type('GradCAM', (GradCAM, modules['.base_cam'].BaseCAM), {})
    modules['.activations_and_gradients'].ActivationsAndGradients = ActivationsAndGradients
    modules['.utils.image'].show_cam_on_image = show_cam_on_image
