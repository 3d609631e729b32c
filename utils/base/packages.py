"""Installed packages and their versions, and the version of this toolkit."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils.base.version import VERSION

# The libraries whose version can change the numbers of a run.
_LIBRARIES = (
    'torch', 'transformers', 'peft', 'accelerate', 'tokenizers', 'safetensors', 'numpy', 'jinja2', 'bitsandbytes',
    'deepspeed', 'flash-attn', 'optimum', 'gptqmodel',
)  # fmt: skip


def versions() -> dict[str, str]:
    """Return {name: version} for Python and the installed libraries that can change the numeric results of a run."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {'python': platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def toolkit() -> dict[str, Any]:
    """Return a dict with the version of this toolkit.

    In a git checkout, the dict also has the commit, and whether tracked files differ from this commit.
    """
    import subprocess

    root = Path(__file__).resolve().parents[2]
    found: dict[str, Any] = {'version': VERSION}
    if not (root / '.git').exists():
        return found

    try:
        commit = _git(root, 'rev-parse', 'HEAD')
        changed = _git(root, 'status', '--porcelain', '--untracked-files=no')
    except (OSError, subprocess.SubprocessError):  # git is not installed, or another user owns the checkout
        return found
    return {**found, 'commit': commit, 'changed_since': bool(changed)}


def _git(root: Path, *words: str) -> str:
    import subprocess

    command = ['git', '--no-optional-locks', '-C', str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def missing_requirement(requirement: str) -> str | None:
    """Return a message if the package that a model requires is missing or has a wrong version.

    `requirement` has the form 'transformers>=5.2'. The message contains the command that installs the package. Returns
    None if the requirement is met.
    """
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        return f'this model needs {requirement}, which is not installed. Run: pip install "{requirement}"'
    if wanted.specifier.contains(found, prereleases=True):
        return None
    return f'this model needs {requirement}, but {found} is installed. Run: pip install "{requirement}"'


def package_version(name: str) -> str:
    """Return the version of an installed package. Returns '' if the package is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return ''


def has_package(name: str) -> bool:
    """Return whether a package is installed. The package is not imported.

    A folder of the same name without Python files is no package. Some tools leave such a folder where they run.
    """
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


def leave_out(names: Iterable[str]) -> None:
    """Make later imports of the packages `names` fail, as if these packages were not installed.

    peft, accelerate and transformers import every optional package that is installed, even if it is not used. They
    import faster without such packages. A package that is already imported stays. Call this only in a process that runs
    one program, because the packages cannot be imported later.
    """
    for name in names:
        # With None, an import raises ImportError, and importlib.util.find_spec returns None.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
