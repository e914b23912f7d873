"""How weights begin: so that signal and gradient keep their size through a network without norms.

Of residual networks without norms, see :func:`equinorm.fixup_init_`, :class:`equinorm.FixupBlock`, :class:`equinorm.ReZero` and
:class:`equinorm.SkipInit`, which need to know the branches.
"""

from __future__ import annotations

from equinorm.init.layers import fans as fans
from equinorm.init.lsuv import lsuv as lsuv
from equinorm.init.model import initialize as initialize
from equinorm.init.orthogonal import delta_orthogonal_ as delta_orthogonal_
from equinorm.init.orthogonal import orthogonal_ as orthogonal_
from equinorm.init.scaling import gain as gain
from equinorm.init.scaling import he_ as he_
from equinorm.init.scaling import lecun_ as lecun_
from equinorm.init.scaling import xavier_ as xavier_
