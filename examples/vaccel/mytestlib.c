/* A library for exec_with_resource: cc -shared -fPIC -o libmytestlib.so mytestlib.c
 *
 * A function gets arrays of arguments to read and to write, and returns 0 when all is well. It runs in a process that
 * opens no file, no socket and starts no process.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct vaccel_arg {
	void *buf;
	size_t size;
	int type;
	uint32_t custom_type_id;
	bool owned;
};

/* Doubles an int. */
int mytestfunc(struct vaccel_arg *read, size_t nr_read, struct vaccel_arg *write, size_t nr_write)
{
	int32_t number;

	if (nr_read != 1 || nr_write != 1 || read[0].size != sizeof number || write[0].size != sizeof number)
		return 22;
	memcpy(&number, read[0].buf, sizeof number);
	number *= 2;
	memcpy(write[0].buf, &number, sizeof number);
	return 0;
}
