"""What papers published for 5-way episodes of CIFAR-FS and FC100, the class splits of CIFAR-100.

All are inductive: a query is classified without a look at the others.
"""

# Parameters of the encoders, in millions. Four 3x3 convolutions of f filters have
# 9 * (3 * f + 3 * f * f) weights; ResNet-12s differ in width.
FILTERS_32, FILTERS_64, RESNET_12 = "0.03", "0.11", "8 to 12"
# (method, encoder, its parameters or None, accuracy in % for k = 1, for k = 5)
CIFAR_FS = (
    # Finn et al. 2017, Snell et al. 2017; these numbers are by Bertinetto et al. 2018. Lee et al.
    # 2019, "Meta-Learning with Differentiable Convex Optimization", name the encoders.
    ("MAML", "4 convolutions, 32 filters", FILTERS_32, 58.9, 71.5),
    ("ProtoNet", "4 convolutions, 64 filters", FILTERS_64, 55.5, 72.0),
    # Bertinetto et al. 2018, "Meta-learning with differentiable closed-form solvers": the first
    # version of the paper, which has 64.0 and 78.9 with up to 512 filters; then the last one
    ("R2D2, preprint", "4 convolutions, 64 filters", FILTERS_64, 60.0, 76.1),
    ("R2D2", "4 convolutions, up to 512 filters", None, 65.3, 79.4),
    # Xu et al. 2021, "Attentional Constellation Nets for Few-Shot Learning"
    ("ConstellationNet", "4 convolutions, 64 filters, attention", None, 69.3, 82.7),
    # Tian et al. 2020, "Rethinking Few-Shot Image Classification"
    ("RFS, distilled", "ResNet-12", RESNET_12, 73.9, 86.9),
    # Rizve et al. 2021, "Exploring Complementary Strengths of Invariant and Equivariant
    # Representations for Few-Shot Learning"
    ("Rizve et al. 2021", "ResNet-12", RESNET_12, 77.9, 89.7),
)
FC100 = (
    # Finn et al. 2017; the number is not that paper's, but one that later papers compare with
    ("MAML", "4 convolutions", None, 38.1, 50.4),
    ("Rizve et al. 2021", "ResNet-12", RESNET_12, 47.8, 65.3),
)


def published_results(split, n_way):
    """Return the rows of CIFAR_FS or FC100 if that is the name of the split, for 5-way episodes."""
    return {"cifar_fs": CIFAR_FS, "fc100": FC100}.get(split, ()) if n_way == 5 else ()
