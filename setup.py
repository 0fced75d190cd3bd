"""Install ecomrec. Everything that varies is read from settings.ini, which nbdev reads too."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(HERE / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
BUNDLED = ("nbs/experiments", "nbs/_static", "data/shop")


class BuildWithExperiments(build_py):
    """Ship the experiments, the report's scripts and the demo shop inside the wheel."""

    def run(self):
        super().run()
        if not self.editable_mode:
            bundled = Path(self.build_lib) / "ecomrec" / "_bundled"
            shutil.rmtree(bundled, ignore_errors=True)
            for folder in BUNDLED:
                shutil.copytree(HERE / folder, bundled / folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=settings["keywords"].split(),
    packages=find_packages(include=["ecomrec", "ecomrec.*"]),
    package_data={"": ["*.json", "*.txt", "*.csv", "*.css", "*.js", "*.html"]},
    python_requires=f">={settings['min_python']},<3.12",
    install_requires=settings["requirements"].split(),
    extras_require={"dev": settings["dev_requirements"].split()},
    entry_points={"console_scripts": settings["console_scripts"].split()},
    cmdclass={"build_py": BuildWithExperiments},
)
