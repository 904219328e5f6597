"""Ways to apply the comparison matrix. Each module offers the same two functions, ``matvec`` and ``rmatvec``."""
