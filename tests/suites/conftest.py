from few_samples import few_images  # noqa: F401
