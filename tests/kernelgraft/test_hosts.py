"""Hosts are found under any of their names and compared with the tested range, without importing them."""

import logging
import sys

import pytest

from kernelgraft import hosts
from kernelgraft.errors import IncompatibleHost
from kernelgraft.hookspecs import HostRequirement

HOST = HostRequirement("fakehost", ("fakehost", "fakehost-cpu"), ">=0.32,<0.34")


@pytest.mark.parametrize("version", ["0.32.0", "0.33.5", "0.32.1+cpu", "0.33.1rc1.dev12+g0abcdef"])
@pytest.mark.parametrize("distribution", HOST.distributions)
def test_versions_in_the_range_are_taken_under_either_name(site, distribution, version):
    site.distribution(distribution, version)
    site.module("fakehost", "raise AssertionError('imported')")
    status = hosts.inspect_host(HOST)
    assert (status.ok, status.distribution, status.version) == (True, distribution, version)
    hosts.require_host("mine", HOST)
    assert "fakehost" not in sys.modules


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("0.31.9", "outside the tested range"),
        ("0.34.0", "outside the tested range"),
        ("main", "not a version that can be compared"),
    ],
)
def test_other_versions_are_refused_with_the_range_and_what_was_found(site, version, problem):
    site.host("fakehost", version)
    with pytest.raises(IncompatibleHost) as caught:
        hosts.require_host("mine", HOST)
    assert str(caught.value) == (
        f"plugin 'mine' needs fakehost or fakehost-cpu >=0.32,<0.34: fakehost {version} is {problem}"
    )


def test_a_missing_host_is_refused(site):
    with pytest.raises(IncompatibleHost, match="none is installed"):
        hosts.require_host("mine", HOST)


def test_a_distribution_without_its_module_is_refused(site):
    site.distribution("fakehost", "0.32.0")
    with pytest.raises(IncompatibleHost, match="the module fakehost cannot be found"):
        hosts.require_host("mine", HOST)


def test_untested_releases_warn_once(site, caplog):
    site.distribution("torch", "2.99.1+cpu")
    site.distribution("triton", "3.6.0")
    hosts.warn_about_untested_versions.cache_clear()
    with caplog.at_level(logging.WARNING, logger="kernelgraft"):
        hosts.warn_about_untested_versions()
        hosts.warn_about_untested_versions()
    assert [record.getMessage() for record in caplog.records] == [
        "torch 2.99.1+cpu is untested; tested are 2.11 and 2.13"
    ]
