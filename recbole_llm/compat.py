"""RecBole 1.2.1 on today's numpy: the aliases that RecBole's own code still spells the old way.

RecBole is frozen upstream (last commit February 2025). It names ``np.float``, ``np.float_`` and others that
numpy 2 no longer has, and a method that scipy 1.13 took from ``dok_matrix`` (LightGCN, NGCF and others build their
graph with it). We give these names back, only where they are missing; nothing else is patched.
"""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import scipy.sparse

from recbole_llm.errors import UserError

# RecBole's metrics, datasets and samplers use these names; see configurator.py `compatibility_settings`.
NUMPY_ALIASES = {
    "bool": np.bool_,
    "int": np.int64,
    "float": np.float64,
    "complex": np.complex128,
    "object": np.object_,
    "str": np.str_,
    "long": np.int64,
    "unicode": np.str_,
    "float_": np.float64,
    "complex_": np.complex128,
    "unicode_": np.str_,
}


def add_numpy_aliases() -> None:
    """Give numpy the names RecBole 1.2.1 uses, where this numpy lacks them. Safe to call again."""
    for name, kind in NUMPY_ALIASES.items():
        if name not in np.__dict__:
            setattr(np, name, kind)


def add_dok_update() -> None:
    """Give scipy's ``dok_matrix`` the ``_update`` that RecBole's graph models call, where this scipy lacks it."""
    if not hasattr(scipy.sparse.dok_matrix, "_update"):
        scipy.sparse.dok_matrix._update = lambda self, entries: self._dict.update(entries)


def check_pandas() -> None:
    """Refuse pandas 3.

    Raises:
        UserError: under pandas 3 RecBole's in-place ``fillna`` does nothing, and item features turn wrong silently.
    """
    if int(pd.__version__.split(".")[0]) >= 3:
        raise UserError(
            f"pandas {pd.__version__} is installed, but RecBole 1.2.1 corrupts item features silently under pandas 3. "
            "Install an older one: pip install 'pandas>=2,<3'"
        )


def prepare() -> None:
    """Make ``import recbole`` and what follows work; called once by ``import recbole_llm``."""
    check_pandas()
    add_numpy_aliases()
    add_dok_update()
    # RecBole's own deprecations, which its users cannot act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"recbole\.")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"recbole\.")
