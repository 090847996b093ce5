"""`ffnas` in this process, for situations that need no process of their own."""

import pytest

from search.cli import main


@pytest.fixture
def shown(capsys):
    """Output of `ffnas data`, which has to work."""

    def run(*arguments):
        capsys.readouterr()
        code = main(["data", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


@pytest.fixture
def refused(capsys):
    """The one line with which a command, `data` unless another is named, refuses its input."""

    def run(*arguments, command="data"):
        capsys.readouterr()
        assert main([command, *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1, err
        return err

    return run
