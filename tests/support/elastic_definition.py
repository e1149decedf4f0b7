"""The elastic exchange of one worker by its definition, for loops over the steps of single workers."""

import numpy as np


class Exchanges:
    """The state of a run: x (p, n), c (n,) and the clocks of the workers.

    A gradient from before the exchange is part of the worker's assignment: a center that moves second sees it.
    """

    def __init__(self, x, rates, *, order, grad_point, tau):
        self.x, self.c, self.t = x.copy(), x[0].copy(), np.zeros(len(x), int)
        (self.a_w, self.a_c), self.grad_point, self.tau = rates, grad_point, tau
        self.moves = {
            "jacobi": (self.move_both,),
            "center_first": (self.move_center, self.move_worker),
            "worker_first": (self.move_worker, self.move_center),
        }[order]
        self.n_before = 1 if order == "worker_first" else len(self.moves)

    def before(self, i):
        """Make the part of the exchange between the gradient and the local update."""
        if self.grad_point == "pre" and self.t[i] % self.tau == 0:
            self.make(self.moves[: self.n_before], i)

    def after(self, i):
        """Make the part of the exchange after the local update."""
        if self.grad_point == "pre" and self.t[i] % self.tau == 0:
            self.make(self.moves[self.n_before :], i)
        self.t[i] += 1
        if self.grad_point == "post" and self.t[i] % self.tau == 0:
            self.make(self.moves, i)

    def make(self, moves, i):
        for move in moves:
            move(i)

    def move_worker(self, i):
        self.x[i] = self.x[i] - self.a_w * (self.x[i] - self.c)

    def move_center(self, i):
        self.c = self.c + self.a_c * (self.x[i] - self.c)

    def move_both(self, i):
        e = self.x[i] - self.c
        self.x[i], self.c = self.x[i] - self.a_w * e, self.c + self.a_c * e
