"""Pipelines: declared once in mlenv.yaml, rendered for GitHub Actions, GitLab CI, Jenkins and Buildkite."""
