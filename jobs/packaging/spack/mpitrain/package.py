"""A Spack recipe: copy this folder to packages/py-mpitrain of a repository of your own, then spack install py-mpitrain.

Set git to the address of your copy of the repository, or build a folder: spack dev-build py-mpitrain@main. The MPI is
the one that Spack builds or the site declares as an external package: py-mpi4py is compiled for it.
"""

from spack.package import *


class PyMpitrain(PythonPackage):
    """Train PyTorch models over MPI with methods that do not make every rank wait for every other."""

    license("BSD-3-Clause")

    git = ""  # the address of your copy of the repository

    version("main", branch="main")

    variant("cuda", default=False, description="Vectors on NVIDIA GPUs, by CuPy")

    depends_on("python@3.11:", type=("build", "run"))
    depends_on("py-setuptools@77:", type="build")
    depends_on("mpi", type=("build", "run"))
    depends_on("py-greenlet@3.0:", type=("build", "run"))
    depends_on("py-h5py@3.11: ~mpi", type=("build", "run"))
    depends_on("py-matplotlib@3.9:", type=("build", "run"))
    depends_on("py-ml-dtypes@0.5:", type=("build", "run"))
    depends_on("py-mpi4py@4.0:", type=("build", "run"))
    depends_on("py-networkx@3.2:", type=("build", "run"))
    depends_on("py-numba@0.61:", type=("build", "run"))
    depends_on("py-numpy@2.0:", type=("build", "run"))
    depends_on("py-pillow@10:", type=("build", "run"))
    depends_on("py-rich@13.7:", type=("build", "run"))
    depends_on("py-safetensors@0.5:", type=("build", "run"))
    depends_on("py-scikit-learn@1.5:", type=("build", "run"))
    depends_on("py-torch@2.6:", type=("build", "run"))
    depends_on("py-torch ~cuda", when="~cuda", type=("build", "run"))
    depends_on("py-torch +cuda", when="+cuda", type=("build", "run"))
    depends_on("py-tqdm@4.66:", type=("build", "run"))
    depends_on("py-cupy@14:", when="+cuda", type=("build", "run"))

    import_modules = ["mpitrain"]
