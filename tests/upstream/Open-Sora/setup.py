from setuptools import find_packages, setup

setup(name="opensora", version="1.2.0", packages=find_packages(include=["opensora", "opensora.*"]))
