"""A network by name: what makes it, and its weights from checkpoints, every one of them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..check import FLOATS, name_of
from ..errors import ArgumentError, CheckpointError
from ..methods.compat import Signature, agree
from .checkpoint import Checkpoint

_OP = "model"
_FORMS = "path/to/file.py:factory, package.module:factory, or a folder with a config.json"


class Network:
    """An architecture: `load` gives a model of it, in eval mode, with the weights of a checkpoint.

    `model` is one with new weights, `inputs` names its arguments; `folder` holds its configuration,
    `file` the factory.

    name: "path/to/file.py:factory" or "package.module:factory", a callable without arguments that
    returns the module; or the folder of a transformers checkpoint, for `AutoModel`.
    """

    def __init__(self, name: str) -> None:
        self.folder = Path(name) if Path(name).is_dir() else None
        source, colon, attribute = name.rpartition(":")
        self.file = Path(source) if source.endswith(".py") else None
        if self.folder is not None:
            self._config = _config(self.folder)
            self.model = _transformers().AutoModel.from_config(self._config)
        elif colon:
            self._make = _factory(source, attribute)
            self.model = self._new()
        else:
            what = "names no network (networks are read from disk; download it first)"
            raise ArgumentError.of(_OP, what, repr(name), _FORMS)
        self.model.eval()
        self.inputs = list(inspect.signature(self.model.forward).parameters)

    def _new(self) -> nn.Module:
        model = self._make()
        if not isinstance(model, nn.Module):
            got = type(model).__name__
            raise ArgumentError.of(_OP, "the factory makes no module", got, "a torch.nn.Module")
        return model

    def load(self, path: Path) -> nn.Module:
        """Raises: CheckpointError with all tensors that are missing, left over or do not fit."""
        checkpoint = Checkpoint(path)
        tensors = {name: checkpoint.read(name) for name in checkpoint.signatures}
        if self.folder is None:
            model = _plain(self._new(), tensors, path)
        else:
            model = _pretrained(type(self.model), self._config, tensors, path)
        checkpoint.close()
        return model.eval()


# ---- by a factory ----------------------------------------------------------------------------


def _factory(source: str, attribute: str) -> Any:
    if source.endswith(".py"):
        module = _module_of_file(Path(source))
    else:
        try:
            with _importable(Path.cwd()):
                module = importlib.import_module(source)
        except ModuleNotFoundError as error:
            if not f"{source}.".startswith(f"{error.name}."):
                raise  # a module that the user's own module needs
            raise ArgumentError.of(_OP, "no such module", repr(source), _FORMS) from None
    found: Any = module
    for name in attribute.split("."):
        found = getattr(found, name, None)
    if not callable(found):
        expected = "a callable without arguments that returns a torch.nn.Module"
        raise ArgumentError.of(_OP, f"{source} has no such factory", repr(attribute), expected)
    return found


def _module_of_file(path: Path) -> ModuleType:
    """The module of a file, which finds its neighbours as a script does."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ArgumentError.of(_OP, "no such file", str(path), _FORMS)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickle look their module up
    with _importable(path.resolve().parent):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _plain(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """With these tensors; of tied ones, a checkpoint may hold one name only."""
    own = model.state_dict(keep_vars=True)
    given = {id(x) for name, x in own.items() if name in tensors}
    needed = {name: x for name, x in own.items() if name in tensors or id(x) not in given}
    wrong = agree(
        {
            "the model": {name: Signature.of(x) for name, x in needed.items()},
            "the checkpoint": {name: Signature.of(x) for name, x in tensors.items()},
        }
    )
    for name, x in tensors.items():
        if name not in wrong and torch.promote_types(x.dtype, own[name].dtype) != own[name].dtype:
            wrong[name] = f"{name_of(x.dtype)} would be rounded to {name_of(own[name].dtype)}"
    _require(path, wrong)
    model.load_state_dict(tensors, strict=False)
    return model


def _require(path: Path, wrong: dict[str, str]) -> None:
    if wrong:
        lines = "".join(f"\n  {name}: {what}" for name, what in sorted(wrong.items()))
        raise CheckpointError(f"{path}: {len(wrong)} tensors do not fit the model:{lines}")


# ---- of transformers -------------------------------------------------------------------------


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "transformers":
            raise  # transformers is there but broken: its own message says more than ours
        expected = "pip install transformers, or a factory"
        raise ArgumentError.of(_OP, "transformers is not installed", "a folder", expected) from None
    return transformers


def _config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise ArgumentError.of(_OP, "the folder has no config.json", str(folder), _FORMS)
    try:
        return _transformers().AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        got, expected = str(error).splitlines()[0], "one of an architecture of transformers"
        what = f"{folder / 'config.json'} cannot be read"
        raise ArgumentError.of(_OP, what, got, expected) from None


def _pretrained(kind: Any, config: Any, tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """As transformers loads it, with its renamings, in the widest dtype of the tensors."""
    dtypes = [x.dtype for x in tensors.values() if x.dtype in FLOATS]
    with _silent():
        model, found = kind.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=functools.reduce(torch.promote_types, dtypes, torch.float16),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    wrong = dict.fromkeys(found["missing_keys"], "missing from the checkpoint")
    wrong |= dict.fromkeys(found["unexpected_keys"], "missing from the model")
    for name, its, mine in found["mismatched_keys"]:
        wrong[name] = f"shape differs: {list(its)} in the checkpoint, {list(mine)} in the model"
    _require(path, wrong)
    return model


@contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' report of what it loaded; here it is an error if there is any."""
    logging = _transformers().utils.logging
    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
