"""The tasks that settings can name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from choral.trainers.data.sets import adult, comments, convex, digits, fashion, shakespeare
from choral.trainers.task.settings import Split, Training
from choral.trainers.task.task import Task

TASKS: dict[str, Callable[[Split, Training, int, Path | None], Task]] = {
    "digits": lambda split, training, seed, _: digits.load(split, training, seed),
    "fashion": fashion.load,
    "comments": comments.load,
    "adult": adult.load,
    "shakespeare": shakespeare.load,
    "comments-convex": convex.comments,
    "posts-convex": convex.posts,
}
