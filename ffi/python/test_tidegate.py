"""Tests of the binding, on the volume that TIDEGATE_TEST_TARGET names; its content is lost."""

import array
import errno
import os
import threading
import unittest

import tidegate

TARGET = os.environ.get("TIDEGATE_TEST_TARGET")
LOG = (1 << 20, 64 << 10)


@unittest.skipUnless(TARGET, "TIDEGATE_TEST_TARGET names no volume")
class DeviceTest(unittest.TestCase):
    def setUp(self):
        self.device = tidegate.Device(TARGET)
        self.addCleanup(self.device.close)

    def fails(self, number):
        return self.assertRaisesRegex(tidegate.Error, rf"\[Errno {number}\] .")

    def test_info(self):
        info = self.device.info()
        self.assertGreater(info.volume_bytes, 2 << 20)
        self.assertGreaterEqual(info.write_bytes_max, 4096)
        self.assertIn(info.ack, ("memory", "log"))
        self.assertIn(info.name, repr(info))
        self.assertRegex(tidegate.version(), r"^\d+\.\d+\.\d+$")

    def test_bytes_of_any_kind_at_any_offset(self):
        for data in (b"abc", bytearray(b"de"), memoryview(b"0123456")[2:5], array.array("I", [1, 2, 3])):
            ticket = self.device.write(4095, data)
            self.assertGreater(ticket, 0)
            self.assertEqual(self.device.read(4095, memoryview(data).nbytes), bytes(memoryview(data).cast("B")))

    def test_parts_are_one_write(self):
        before = self.device.write(10, b"_" * 9)
        self.assertEqual(self.device.write(10, b"ab", b"", b"cde", durable=True), before + 1)
        self.assertEqual(self.device.read(10, 9), b"abcde____")

    def test_tickets(self):
        tickets = [self.device.write_async(i * 100, bytes([i]) * 100) for i in range(50)]
        self.assertEqual(tickets, sorted(set(tickets)))
        self.device.persist(tickets[-1])
        self.assertGreaterEqual(self.device.durable, tickets[-1])
        self.assertGreaterEqual(self.device.accepted, self.device.durable)
        self.assertEqual(self.device.read(0, 5000), b"".join(bytes([i]) * 100 for i in range(50)))
        self.device.flush()

    def test_zeroes(self):
        self.device.write(100, b"x" * 300)
        self.device.write_zeroes(200, 100)
        self.assertEqual(self.device.read(100, 300), b"x" * 100 + b"\0" * 100 + b"x" * 100)
        self.assertGreater(self.device.discard(100, 300), 0)

    def test_failures_have_errno_and_message(self):
        size = self.device.info().volume_bytes
        with self.fails(errno.ERANGE):
            self.device.read(size - 1, 2)
        with self.fails(errno.ERANGE):
            self.device.write(size, b"x")
        with self.assertRaises(OSError):
            tidegate.Device("/nonexistent/socket")
        device = tidegate.Device(TARGET)
        device.close()
        device.close()
        with self.fails(errno.EBADF):
            device.read(0, 1)

    def test_threads_share_a_device(self):
        def work(number):
            for i in range(50):
                at = 65536 + number * 1000
                self.device.write(at, bytes([i]) * 999)
                self.assertEqual(self.device.read(at, 999), bytes([i]) * 999)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def test_calls_that_wait_are_interrupted(self):
        def work():
            for i in range(300):
                try:
                    self.device.persist(self.device.write(0, bytes([i % 256])))
                except tidegate.Error as error:
                    self.assertEqual(error.errno, errno.EINTR)

        thread = threading.Thread(target=work)
        thread.start()
        while thread.is_alive():
            self.device.interrupt()
        thread.join()
        self.device.persist(self.device.write(0, b"later calls are not concerned"))

    def test_there_is_one_sole_writer(self):
        with tidegate.Device(TARGET, sole_writer=True):
            with self.fails(errno.EBUSY):
                tidegate.Device(TARGET, sole_writer=True)
            tidegate.Device(TARGET).close()
        tidegate.Device(TARGET, sole_writer=True).close()

    def test_log(self):
        with self.device.log(*LOG, format=True) as log:
            self.assertEqual(list(log), [])
            appended = [(log.append(b"entry ", b"%d" % i)[0], b"entry %d" % i) for i in range(20)]
            log.persist(appended[-1][0])
            self.assertEqual(list(log), appended)
        with self.device.log(*LOG) as log:
            self.assertEqual(list(log), appended)
            log.truncate(appended[5][0])
            self.assertEqual(list(log), appended[5:])
            self.assertEqual(log.head, appended[5][0])
            self.assertIsNone(log.read(log.tail))
            self.assertEqual(list(log.entries(appended[18][0])), appended[18:])
            with self.fails(errno.EINVAL):
                log.read(appended[0][0])
            with self.fails(errno.EINVAL):
                log.append(b"")
            with self.fails(errno.EMSGSIZE):
                log.append(bytes(LOG[1]))
            with self.fails(errno.ENOSPC):
                while True:
                    log.append(bytes(5000))

    def test_a_range_without_a_log(self):
        self.device.write(LOG[0], b"\1" * 64)
        with self.fails(errno.EEXIST):
            self.device.log(*LOG, create=True)
        self.device.write_zeroes(*LOG)
        with self.fails(errno.ENOENT):
            self.device.log(*LOG)


if __name__ == "__main__":
    unittest.main()
