"""The packages of the wheel: what pyproject.toml cannot say, a search and folders of other names at once."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["segpipe", "segpipe.*"]),
        "segpipe.builtin",
        "segpipe_flows",
        "segpipe_tasks",
    ]
)
