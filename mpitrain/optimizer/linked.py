"""A torch optimizer that has the parameter groups, the state and the defaults of another one."""

from __future__ import annotations

from types import SimpleNamespace, TracebackType
from typing import Any, NoReturn, Self

import torch

from mpitrain.errors import UsageError
from mpitrain.optimizer.checks import TOO_LATE_FOR_GROUPS


class _Linked:
    """An attribute that is read and set in the other optimizer, which replaces the object in ``load_state_dict``."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, linked: Any, owner: type) -> Any:
        return self if linked is None else getattr(linked._base, self._name)

    def __set__(self, linked: Any, value: object) -> None:
        setattr(linked._base, self._name, value)


class LinkedOptimizer(torch.optim.Optimizer):
    """An optimizer that shares the parameter groups and the state of another optimizer.

    A scheduler of either optimizer changes both, also after ``base.load_state_dict``.

    Args:
        base: The other optimizer.
    """

    param_groups: Any = _Linked()
    state: Any = _Linked()
    defaults: Any = _Linked()

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self._base: Any = SimpleNamespace(param_groups=[], state={}, defaults={})  # torch's constructor sets them
        super().__init__(base.param_groups, dict(base.defaults))
        self._base = base

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse to add a group, because the length of the flat vector is fixed.

        Raises:
            UsageError: The message says what to do instead.
        """
        if isinstance(self._base, torch.optim.Optimizer):
            raise UsageError(TOO_LATE_FOR_GROUPS)
        super().add_param_group(param_group)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be copied or pickled.

        Raises:
            UsageError: The message says what to do instead.
        """
        raise UsageError(
            f"a {type(self).__name__} cannot be copied or pickled, because other ranks share its memory: "
            "copy or save optimizer.state_dict()"
        )

    def close(self) -> None:
        """Release the resources of the optimizer."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:  # with an exception on one rank only, the others would never come
            self.close()
