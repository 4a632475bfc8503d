"""When and where: Prefect flows over the stages of `pipelines`."""
