"Simulate full and read-only disks and killed processes, each in a fork of this process that leaves nothing behind."
import ctypes
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import pytest

NEWNS, NEWUSER, RDONLY, REMOUNT, PRIVATE = 0x20000, 0x10000000, 1, 32, 0x44000
NOT_PERMITTED = 77

def forked(work) -> int: # exit code; negative: the signal
    "Run something in a fork of this process."
    sys.stdout.flush(), sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            found = work()
            code = found if type(found) is int else 0
        except BaseException: traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def _call(name, *args) -> None:
    "Call a function of the C library; raise its error."
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*args): raise OSError(ctypes.get_errno(), name)

class Disk:
    "A small disk in memory that only this process sees."
    def __init__(self, folder:Path, kb:int):
        self.folder = folder
        folder.mkdir(parents=True)
        _call('mount', b'none', os.fsencode(folder), b'tmpfs', 0, b'size=%dk' % kb)

    def change(self, kb:int=16384, flags:int=0) -> None:
        (self.folder/'.filler').unlink(missing_ok=True)
        _call('mount', b'none', os.fsencode(self.folder), b'tmpfs', REMOUNT | flags, b'size=%dk' % kb)
    def fill(self) -> None:
        "Leave no room, until `change`."
        with suppress(OSError), open(self.folder/'.filler', 'wb', buffering=0) as f:
            while f.write(bytes(4096)) == 4096: pass
    def shut(self) -> None: self.change(flags=RDONLY)

def with_disks(work) -> None:
    "Run something in a fork that may mount disks; skipped where that is not permitted."
    def inside():
        try:
            user = os.geteuid()
            _call('unshare', NEWNS | (NEWUSER if user else 0))
            if user: Path('/proc/self/uid_map').write_text(f'{user} {user} 1')
            _call('mount', b'none', b'/', None, PRIVATE, None)
            Disk(work.folder/'try', 4)
        except (OSError, AttributeError): return NOT_PERMITTED
        work()
    if not sys.platform.startswith('linux'): pytest.skip('a small disk is mounted with Linux calls')
    code = forked(inside)
    if code == NOT_PERMITTED: pytest.skip('mounting a small disk is not permitted here')
    assert code == 0, 'see the traceback of the child above'

def killed(work, step:int) -> int: # exit code
    "Run something in a fork that is killed just before it moves its step-th file to its place."
    def inside():
        left, move = [step], os.replace
        def replace(*args, **kw):
            left[0] -= 1
            if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
            return move(*args, **kw)
        os.replace = replace
        work()
    return forked(inside)

def moves(work) -> int:
    "Run something here; how many files it moves to their place."
    count, move = [0], os.replace
    def replace(*args, **kw):
        count[0] += 1
        return move(*args, **kw)
    os.replace = replace
    try: work()
    finally: os.replace = move
    return count[0]
