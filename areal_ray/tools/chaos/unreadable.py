"""Files that cannot be opened: a library, loaded before the C library, that refuses to open what it is told to."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from pathlib import Path

from areal_ray.storage import LocalStorage
from areal_ray.tools.chaos.world import World

_ORDER = "AREAL_RAY_CHAOS_REFUSE"  # names the file that says "errno path": what begins with that path is not opened
_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int (*opener)(const char *, int, ...);

static int refused(const char *path)
{
    static opener real;
    char order[4200], *rest;
    const char *where = getenv("AREAL_RAY_CHAOS_REFUSE");
    int file, number;
    ssize_t size;

    if (!where || !path || path[0] != '/')
        return 0;
    if (!real)
        real = (opener)dlsym(RTLD_NEXT, "open");
    file = real(where, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return 0;
    size = read(file, order, sizeof order - 1);
    close(file);
    if (size <= 0)
        return 0;
    order[size] = 0;
    number = (int)strtol(order, &rest, 10);
    return *rest == ' ' && rest[1] && !strncmp(path, rest + 1, strlen(rest + 1)) ? number : 0;
}

#define REFUSING(name)                                              \
    int name(const char *path, int flags, ...)                      \
    {                                                               \
        static opener real;                                         \
        int before = errno, number = refused(path);                 \
        va_list more;                                               \
        mode_t mode;                                                \
        if (number) { errno = number; return -1; }                  \
        errno = before;                                             \
        va_start(more, flags);                                      \
        mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(more, mode_t) : 0; \
        va_end(more);                                               \
        if (!real) real = (opener)dlsym(RTLD_NEXT, #name);          \
        return real(path, flags, mode);                             \
    }

REFUSING(open)
REFUSING(open64)
"""


def compiler() -> bool:
    """Whether there is one."""
    return shutil.which("gcc") is not None


def install(folder: Path) -> Path:
    """Have all processes that are started from now on ask a file whether they may open another; that file.

    Args:
        folder: for the library.
    """
    source, library, order = folder / "refuse.c", folder / "refuse.so", folder / "refuse"
    source.write_text(_SOURCE)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    others = os.environ.get("LD_PRELOAD")
    os.environ["LD_PRELOAD"] = f"{library}:{others}" if others else str(library)
    os.environ[_ORDER] = str(order)
    return order


def refuse(number: int, world: World, draw: random.Random) -> None:
    """The newest checkpoint's files cannot be opened while the workers start again: the next older one is taken."""
    assert world.refuse is not None
    assert isinstance(world.storage, LocalStorage)
    name = world.newest()
    assert name is not None
    attempts, trained = world.count("attempt"), world.count("training")
    world.damaged.add(name)
    order = world.refuse.with_suffix(".new")
    order.write_text(f"{number} {world.storage.sub(name).location}/shard-")
    os.replace(order, world.refuse)
    try:
        for pid in world.workers():
            world.kill(pid)
        what = f"a start without {name} ({errno.errorcode[number]})"
        world.until(what, lambda: world.count("attempt") > attempts and world.count("training") > trained)
    finally:
        world.refuse.unlink()
