"""Every schema that a person writes as YAML. Nothing here loads torch or Prefect."""
