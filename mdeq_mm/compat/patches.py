"""Behaviour of mmengine, mmseg and torch that is changed in place, and why."""

import functools
import importlib
import importlib.util
import inspect
import os
import sys

from .stack import PACKAGES, can_import, installed_version


def _is_importable(name: str) -> bool:
    """Replaces mmengine's ``is_installed``; takes the name of a module or of a distribution."""
    return can_import(_module_of(name)) or installed_version(name) is not None


def _folder_of(name: str) -> str:
    """Replaces mmengine's ``get_installed_path``; takes a module's or distribution's name."""
    module = _module_of(name)
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f'{module} cannot be imported here, or is a namespace package.')
    return os.path.dirname(spec.origin)


def _module_of(name: str) -> str:
    for package in PACKAGES:
        if name in package.distributions:
            return package.module
    return name


def patch_config_lookup() -> None:
    """Let configs inherit from another project's, ``_base_ = ['mmseg::_base_/...']``.

    mmengine looks that project up by the name of upstream's distribution. The forks have other
    names, the files of an editable install lie elsewhere than its record, and upstream's mmengine
    uses pkg_resources, which setuptools 82 removed. Asking the import system works in each case.
    May be called again.
    """
    from mmengine import utils
    from mmengine.config import config
    from mmengine.utils import package_utils

    # mmengine imports the two functions by name, so they are replaced in each module that did.
    for holder in (package_utils, utils, config):
        holder.is_installed = _is_importable
        holder.get_installed_path = _folder_of


def patch_class_weights() -> None:
    """Let mmseg's cross entropy take class weights where some pixels are ignored.

    Upstream's version looks up the weight of the label 255 and fails; with ``avg_non_ignore`` the
    forks' version fails as well. The mean is taken over the weights of the labelled pixels. Call
    this after mmseg is imported and before a model is built; without mmseg it does nothing. May be
    called again.
    """
    module = sys.modules.get('mmseg.models.losses.cross_entropy_loss')
    if module is None or hasattr(module.cross_entropy, '__wrapped__'):
        return
    original = module.cross_entropy

    @functools.wraps(original)
    def cross_entropy(pred, label, *args, **kwargs):
        given = inspect.signature(original).bind(pred, label, *args, **kwargs)
        given.apply_defaults()
        options = given.arguments
        weights = options['class_weight']
        mean = options['reduction'] == 'mean' and options['avg_factor'] is None
        if weights is not None and mean:
            options['avg_factor'] = weights[label[label != options['ignore_index']]].sum()
        return original(*given.args, **given.kwargs)

    module.cross_entropy = cross_entropy


def patch_norm_fusion() -> None:
    """Let mmcv's ``fuse_conv_bn`` fuse a batch norm without a scale and a shift.

    It divides the scale without asking whether there is one. May be called again.
    """
    # mmcv.cnn.utils has a function of the module's name in its place.
    module = importlib.import_module('mmcv.cnn.utils.fuse_conv_bn')
    original = module._fuse_conv_bn
    if hasattr(original, '__wrapped__'):
        return

    @functools.wraps(original)
    def fuse(conv, bn):
        if bn.weight is None:
            affine = type(bn)(bn.num_features, eps=bn.eps).to(bn.running_mean)
            affine.running_mean, affine.running_var = bn.running_mean, bn.running_var
            bn = affine
        return original(conv, bn)

    module._fuse_conv_bn = fuse


def patch_missing_onedl() -> None:
    """Keep the forks from printing that a package of their makers is not installed.

    On import, mmseg and mmpretrain each look for it and tell a debugger that it is not there; but
    without a logger mmengine prints a message of any level. Every other message is printed as
    before. May be called again.
    """
    from mmengine import logging

    original = logging.print_log
    if hasattr(original, '__wrapped__'):
        return

    @functools.wraps(original)
    def print_log(msg, logger=None, *args, **kwargs):
        if logger is not None or msg != 'Could not import OneDL':
            original(msg, logger, *args, **kwargs)

    # The forks import it from here in the moment in which they have something to say.
    logging.print_log = print_log


def allow_repeated_backward() -> None:
    """Let the backward pass of graphs compiled from now on run more than once.

    By default the backward pass of a compiled graph overwrites the tensors saved for it. torch has
    no switch for a single graph.
    """
    import torch._functorch.config as config

    config.donated_buffer = False
