"""What to cite for a solver."""

from evodiff_jax.tables import Solver

_SOFTWARE = "evodiff_jax"

_ENTRIES = {
    _SOFTWARE: """@software{evodiff_jax,
  title = {evodiff\\_jax: few-step sampling of diffusion and flow models in {JAX}},
  author = {{The evodiff\\_jax authors}},
  year = {2026},
  license = {Apache-2.0},
}""",
    "evodiff": """@inproceedings{li2025evodiff,
  title = {{EVODiff}: Entropy-aware Variance Optimized Diffusion Inference},
  author = {Li, Shigui and Chen, Wei and Zeng, Delu},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2025},
  eprint = {2509.26096},
  archiveprefix = {arXiv},
}""",
    "ddim": """@inproceedings{song2021ddim,
  title = {Denoising Diffusion Implicit Models},
  author = {Song, Jiaming and Meng, Chenlin and Ermon, Stefano},
  booktitle = {International Conference on Learning Representations},
  year = {2021},
  eprint = {2010.02502},
  archiveprefix = {arXiv},
}""",
    "dpm_solver": """@inproceedings{lu2022dpmsolver,
  title = {{DPM-Solver}: A Fast {ODE} Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps},
  author = {Lu, Cheng and Zhou, Yuhao and Bao, Fan and Chen, Jianfei and Li, Chongxuan and Zhu, Jun},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2022},
  eprint = {2206.00927},
  archiveprefix = {arXiv},
}""",
    "dpm_solver_pp": """@article{lu2025dpmsolverpp,
  title = {{DPM-Solver++}: Fast Solver for Guided Sampling of Diffusion Probabilistic Models},
  author = {Lu, Cheng and Zhou, Yuhao and Bao, Fan and Chen, Jianfei and Li, Chongxuan and Zhu, Jun},
  journal = {Machine Intelligence Research},
  volume = {22},
  number = {4},
  pages = {730--751},
  year = {2025},
  doi = {10.1007/s11633-025-1562-4},
  eprint = {2211.01095},
  archiveprefix = {arXiv},
}""",
    "dpm_solver_v3": """@inproceedings{zheng2023dpmsolverv3,
  title = {{DPM-Solver-v3}: Improved Diffusion {ODE} Solver with Empirical Model Statistics},
  author = {Zheng, Kaiwen and Lu, Cheng and Chen, Jianfei and Zhu, Jun},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  eprint = {2310.13268},
  archiveprefix = {arXiv},
}""",
    "unipc": """@inproceedings{zhao2023unipc,
  title = {{UniPC}: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models},
  author = {Zhao, Wenliang and Bai, Lujia and Rao, Yongming and Zhou, Jie and Lu, Jiwen},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  eprint = {2302.04867},
  archiveprefix = {arXiv},
}""",
    "deis": """@inproceedings{zhang2023deis,
  title = {Fast Sampling of Diffusion Models with Exponential Integrator},
  author = {Zhang, Qinsheng and Chen, Yongxin},
  booktitle = {International Conference on Learning Representations},
  year = {2023},
  eprint = {2204.13902},
  archiveprefix = {arXiv},
}""",
    "pndm": """@inproceedings{liu2022pndm,
  title = {Pseudo Numerical Methods for Diffusion Models on Manifolds},
  author = {Liu, Luping and Ren, Yi and Lin, Zhijie and Zhao, Zhou},
  booktitle = {International Conference on Learning Representations},
  year = {2022},
  eprint = {2202.09778},
  archiveprefix = {arXiv},
}""",
    "amed": """@inproceedings{zhou2024amed,
  title = {Fast {ODE}-based Sampling for Diffusion Models in Around 5 Steps},
  author = {Zhou, Zhenyu and Chen, Defang and Wang, Can and Chen, Chun},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2024},
  eprint = {2312.00094},
  archiveprefix = {arXiv},
}""",
    "edm": """@inproceedings{karras2022edm,
  title = {Elucidating the Design Space of Diffusion-Based Generative Models},
  author = {Karras, Tero and Aittala, Miika and Aila, Timo and Laine, Samuli},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2022},
  eprint = {2206.00364},
  archiveprefix = {arXiv},
}""",
    "sa_solver": """@inproceedings{xue2023sasolver,
  title = {{SA-Solver}: Stochastic {Adams} Solver for Fast Sampling of Diffusion Models},
  author = {Xue, Shuchen and Yi, Mingyang and Luo, Weijian and Zhang, Shifeng and Sun, Jiacheng and Li, Zhenguo and
            Ma, Zhi-Ming},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  eprint = {2309.05019},
  archiveprefix = {arXiv},
}""",
}

# By the solver's name what its method comes from, beside this software.
_SOURCES = {
    "evodiff": ("evodiff",),
    "variance_optimal": ("evodiff",),  # for the objective
    "ddim": ("ddim",),
    "dpm_solver": ("dpm_solver",),
    "dpm_solver_pp": ("dpm_solver_pp",),
    "sde_dpm_solver_pp": ("dpm_solver_pp",),
    "dpm_solver_v3": ("dpm_solver_v3",),
    "unipc": ("unipc",),
    "deis": ("deis",),
    "ipndm": ("deis", "pndm"),
    "ipndm_v": ("amed", "pndm"),
    "heun": ("edm",),
    "dpm_2": ("dpm_solver", "edm"),
    "sa_solver": ("sa_solver",),
}


def citation(solver: Solver) -> str:
    """The BibTeX of what a solver's results come from: the papers of its method, and this software.

    `variance_optimal` is this project's own: cite it as this software, and the EVODiff paper for the objective.

    Args:
      solver: one of `evodiff_jax.solvers`. Of a solver of your own only this software is cited.

    Returns:
      BibTeX entries, separated by empty lines.

    Raises:
      TypeError: when `solver` is something else.

    Examples:
      >>> import evodiff_jax as ed
      >>> print(citation(ed.solvers.ddim()).splitlines()[0])
      @inproceedings{song2021ddim,
    """
    if not isinstance(solver, Solver):
        raise TypeError(f"citation needs a Solver, such as solvers.evodiff() returns, got {solver!r}")
    return "\n\n".join(_ENTRIES[key] for key in (*_SOURCES.get(solver.name, ()), _SOFTWARE))
