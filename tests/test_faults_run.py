"""How ``faults_run.py`` counts the faults that tests inject."""

import faults_run

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_one"><properties><property name="fault" value="killed"/>
<property name="times" value="7"/><property name="answers" value="6"/></properties></testcase>
<testcase classname="tests.engine.test_b" name="test_two"><properties><property name="fault" value="killed"/>
<property name="times" value="1"/><property name="answers" value="0"/></properties></testcase>
<testcase classname="tests.test_a" name="test_bad"><properties><property name="fault" value="killed"/>
<property name="times" value="100"/><property name="answers" value="100"/></properties><failure/></testcase>
<testcase classname="tests.test_a" name="test_other"/>
</testsuite></testsuites>"""


def test_faults_of_a_failed_test_are_not_counted(tmp_path):
    """Catches: faults of a failed test counted among those that were withstood, or one kind of fault in two rows."""
    (tmp_path / "report.xml").write_text(REPORT)
    (fault,), passed, failed = faults_run.read(tmp_path / "report.xml")
    assert (fault.fault, fault.injected, fault.answers) == ("killed", 8, 6)
    assert fault.files == ["tests/test_a.py", "tests/engine/test_b.py"]
    assert (passed, failed) == (2, ["tests.test_a::test_bad"])
