/* Tries from inside a tenant's worker what its code must not be able to do, and says what it got: "name ERRNO" lines.
 *
 * The same list runs when the library is loaded (a constructor) and when it is called. Arguments are such that each call
 * would do harm, or tell something, if it were allowed.
 */
#include <fcntl.h>
#include <linux/bpf.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define AT AT_FDCWD

static char at_load[16384];

static void note(char *out, const char *name, long result)
{
	size_t used = strlen(out);
	const char *got = result < 0 ? strerrorname_np(errno) : "done";

	snprintf(out + used, sizeof at_load - used, "%s %s\n", name, got);
}

#define TRY(name, ...) note(out, name, syscall(__VA_ARGS__))

static void files(char *out, const char *secret)
{
	char data[64];
	struct { unsigned long flags, mode, resolve; } how = {O_RDONLY, 0, 0};

	TRY("open:/etc/passwd", SYS_openat, AT, "/etc/passwd", O_RDONLY);
	TRY("open:/etc/shadow", SYS_openat, AT, "/etc/shadow", O_RDONLY);
	TRY("open:/var/lib/remora", SYS_openat, AT, "/var/lib/remora", O_RDONLY | O_DIRECTORY);
	TRY("open:/run/remora", SYS_openat, AT, "/run/remora", O_RDONLY | O_DIRECTORY);
	TRY("open:/proc/1/environ", SYS_openat, AT, "/proc/1/environ", O_RDONLY);
	TRY("open:/proc/self/mem", SYS_openat, AT, "/proc/self/mem", O_RDWR);
	TRY("open:/proc/kcore", SYS_openat, AT, "/proc/kcore", O_RDONLY);
	TRY("open:/sys/fs/cgroup", SYS_openat, AT, "/sys/fs/cgroup", O_RDONLY | O_DIRECTORY);
	TRY("open:/sys/kernel", SYS_openat, AT, "/sys/kernel", O_RDONLY | O_DIRECTORY);
	TRY("open:/dev/null", SYS_openat, AT, "/dev/null", O_RDWR);
	TRY("open:/dev/mem", SYS_openat, AT, "/dev/mem", O_RDWR);
	TRY("open:/dev/kvm", SYS_openat, AT, "/dev/kvm", O_RDWR);
	TRY("open:/dev/shm", SYS_openat, AT, "/dev/shm", O_RDONLY | O_DIRECTORY);
	TRY("open:a-file-of-the-host", SYS_openat, AT, secret, O_RDONLY);
	TRY("open:up-and-out", SYS_openat, AT, "../../../../../../etc/passwd", O_RDONLY);
	TRY("create:here", SYS_openat, AT, "x", O_CREAT | O_WRONLY, 0600);
	TRY("create:/", SYS_openat, AT, "/x", O_CREAT | O_WRONLY, 0600);
	TRY("create:/library", SYS_openat, AT, "/library/x", O_CREAT | O_WRONLY, 0600);
	TRY("create:nameless", SYS_openat, AT, "/", O_TMPFILE | O_RDWR, 0600);
	TRY("openat2", SYS_openat2, AT, "/etc/passwd", &how, sizeof how);
	TRY("name_to_handle_at", SYS_name_to_handle_at, AT, "/", data, data, 0);
	TRY("open_by_handle_at", SYS_open_by_handle_at, AT, data, O_RDONLY);
	TRY("execve", SYS_execve, "/bin/sh", NULL, NULL);
	TRY("execveat", SYS_execveat, AT, "/bin/sh", NULL, NULL, 0);
	TRY("memfd_create", SYS_memfd_create, "x", 0);
	TRY("chdir", SYS_chdir, "/");
	TRY("chroot", SYS_chroot, "/empty");
	TRY("pivot_root", SYS_pivot_root, "/", "/empty");
	TRY("mkdirat", SYS_mkdirat, AT, "x", 0700);
	TRY("mknodat:device", SYS_mknodat, AT, "x", 0020666, 0x101);
	TRY("mknodat:fifo", SYS_mknodat, AT, "x", 0010666, 0);
	TRY("symlinkat", SYS_symlinkat, "/etc/passwd", AT, "x");
	TRY("linkat", SYS_linkat, AT, "/library/0", AT, "x", 0);
	TRY("unlinkat", SYS_unlinkat, AT, "/library/0", 0);
	TRY("fchmodat", SYS_fchmodat, AT, "/library/0", 04777);
	TRY("fchownat", SYS_fchownat, AT, "/library/0", 0, 0, 0);
	TRY("truncate", SYS_truncate, "/library/0", 0);
	TRY("mount:tmpfs", SYS_mount, "none", "/empty", "tmpfs", 0, NULL);
	TRY("mount:proc", SYS_mount, "none", "/empty", "proc", 0, NULL);
	TRY("mount:remount", SYS_mount, "none", "/", NULL, MS_REMOUNT | MS_BIND, NULL);
	TRY("umount2", SYS_umount2, "/", MNT_DETACH);
	TRY("fsopen", SYS_fsopen, "tmpfs", 0);
	TRY("open_tree", SYS_open_tree, AT, "/", 1);
	TRY("move_mount", SYS_move_mount, AT, "/", AT, "/empty", 0);
	TRY("mount_setattr", SYS_mount_setattr, AT, "/", 0, data, 32);
	TRY("inotify_init1", SYS_inotify_init1, 0);
	TRY("fanotify_init", SYS_fanotify_init, 0, 0);
}

static void network(char *out)
{
	int pair[2];
	struct { unsigned short family; char path[14]; } address = {AF_UNIX, "\0remora"};

	TRY("socket:inet", SYS_socket, AF_INET, SOCK_STREAM, 0);
	TRY("socket:inet-datagram", SYS_socket, AF_INET, SOCK_DGRAM, 0);
	TRY("socket:inet6", SYS_socket, AF_INET6, SOCK_STREAM, 0);
	TRY("socket:unix", SYS_socket, AF_UNIX, SOCK_STREAM, 0);
	TRY("socket:netlink", SYS_socket, AF_NETLINK, SOCK_RAW, 0);
	TRY("socket:packet", SYS_socket, AF_PACKET, SOCK_RAW, 0);
	TRY("socket:vsock", SYS_socket, AF_VSOCK, SOCK_STREAM, 0);
	TRY("socket:alg", SYS_socket, AF_ALG, SOCK_SEQPACKET, 0);
	TRY("socketpair", SYS_socketpair, AF_UNIX, SOCK_STREAM, 0, pair);
	TRY("connect", SYS_connect, 3, &address, sizeof address);
	TRY("bind", SYS_bind, 3, &address, sizeof address);
	TRY("listen", SYS_listen, 3, 1);
	TRY("accept4", SYS_accept4, 3, NULL, NULL, 0);
	TRY("setsockopt", SYS_setsockopt, 3, SOL_SOCKET, SO_SNDBUF, &(int){1 << 28}, sizeof(int));
}

static void processes(char *out, int agent)
{
	char data[16];
	struct iovec here = {data, sizeof data}, there = {(void *)0x400000, sizeof data};
	struct { unsigned long words[11]; } arguments = {{0}};
	struct rlimit more = {RLIM_INFINITY, RLIM_INFINITY};
	struct sched_param parameter = {0};
	struct { unsigned version; int pid; } head = {0x20080522, 0};
	unsigned capabilities[6] = {~0u, ~0u, ~0u, ~0u, ~0u, ~0u};

	TRY("fork", SYS_clone, SIGCHLD, 0, 0, 0, 0);
	TRY("clone:namespace", SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0);
	TRY("clone:shared-memory", SYS_clone, CLONE_VM | SIGCHLD, 0, 0, 0, 0);
	TRY("clone3", SYS_clone3, &arguments, sizeof arguments);
#ifdef SYS_fork
	TRY("fork:old", SYS_fork);
	TRY("vfork", SYS_vfork);
#endif
	TRY("kill:agent", SYS_kill, agent, 0);
	TRY("kill:all", SYS_kill, -1, SIGKILL);
	TRY("tgkill:agent", SYS_tgkill, agent, agent, 0);
	TRY("tkill", SYS_tkill, agent, SIGKILL);
	TRY("rt_sigqueueinfo", SYS_rt_sigqueueinfo, agent, SIGKILL, data);
	TRY("ptrace:attach", SYS_ptrace, 16, agent, 0, 0);
	TRY("ptrace:me", SYS_ptrace, 0, 0, 0, 0);
	TRY("process_vm_readv", SYS_process_vm_readv, agent, &here, 1, &there, 1, 0);
	TRY("process_vm_writev", SYS_process_vm_writev, agent, &here, 1, &there, 1, 0);
	TRY("pidfd_open", SYS_pidfd_open, agent, 0);
	TRY("pidfd_getfd", SYS_pidfd_getfd, 3, 0, 0);
	TRY("pidfd_send_signal", SYS_pidfd_send_signal, 3, SIGKILL, NULL, 0);
	TRY("kcmp", SYS_kcmp, 1, agent, 0, 0, 0);
	TRY("process_madvise", SYS_process_madvise, 3, &there, 1, 4, 0);
	TRY("wait4", SYS_wait4, -1, NULL, 1, NULL);
	TRY("setpriority", SYS_setpriority, 0, 0, -20);
	TRY("sched_setscheduler", SYS_sched_setscheduler, 0, SCHED_FIFO, &parameter);
	TRY("prlimit64:more", SYS_prlimit64, 0, RLIMIT_AS, &more, NULL);
	TRY("setrlimit", SYS_setrlimit, RLIMIT_NPROC, &more);
	TRY("setuid", SYS_setuid, 0);
	TRY("setresgid", SYS_setresgid, 0, 0, 0);
	TRY("setgroups", SYS_setgroups, 0, NULL);
	TRY("capset", SYS_capset, &head, capabilities);
	TRY("setsid", SYS_setsid);
	TRY("unshare:user", SYS_unshare, CLONE_NEWUSER);
	TRY("unshare:network", SYS_unshare, CLONE_NEWNET);
	TRY("setns", SYS_setns, 3, 0);
	TRY("prctl:dumpable", SYS_prctl, 4, 1, 0, 0, 0);
	TRY("prctl:filter", SYS_prctl, 22, 1, 0, 0, 0);
	TRY("personality", SYS_personality, 0x0040000);
}

static void kernel(char *out)
{
	struct timeval now = {0, 0};
	struct timespec then = {0, 0};
	char data[512] = {0};

	TRY("bpf", SYS_bpf, BPF_PROG_LOAD, data, 48);
	TRY("io_uring_setup", SYS_io_uring_setup, 8, data);
	TRY("userfaultfd", SYS_userfaultfd, 0);
	TRY("perf_event_open", SYS_perf_event_open, data, 0, -1, -1, 0);
	TRY("keyctl", SYS_keyctl, 0, -3, 0);
	TRY("add_key", SYS_add_key, "user", "x", "y", 1, -3);
	TRY("request_key", SYS_request_key, "user", "x", NULL, -3);
	TRY("init_module", SYS_init_module, data, sizeof data, "");
	TRY("finit_module", SYS_finit_module, 0, "", 0);
	TRY("delete_module", SYS_delete_module, "x", 0);
	TRY("kexec_load", SYS_kexec_load, 0, 0, NULL, 0);
	TRY("reboot", SYS_reboot, 0xfee1dead, 672274793, 0, NULL);
	TRY("settimeofday", SYS_settimeofday, &now, NULL);
	TRY("clock_settime", SYS_clock_settime, 0, &then);
	TRY("adjtimex", SYS_adjtimex, data);
	TRY("sethostname", SYS_sethostname, "x", 1);
	TRY("syslog", SYS_syslog, 3, data, sizeof data);
	TRY("swapon", SYS_swapon, "/library/0", 0);
	TRY("acct", SYS_acct, NULL);
	TRY("quotactl", SYS_quotactl, 0x800001, NULL, 0, data);
	TRY("shmget", SYS_shmget, 0, 4096, 0600);
	TRY("msgget", SYS_msgget, 0, 0600);
	TRY("semget", SYS_semget, 0, 1, 0600);
	TRY("mq_open", SYS_mq_open, "x", O_CREAT | O_RDWR, 0600, NULL);
	TRY("timer_create", SYS_timer_create, 0, NULL, data);
	TRY("epoll_create1", SYS_epoll_create1, 0);
	TRY("eventfd2", SYS_eventfd2, 0, 0);
	TRY("pipe2", SYS_pipe2, data, 0);
	TRY("splice", SYS_splice, 0, NULL, 1, NULL, 1, 0);
	TRY("vmsplice", SYS_vmsplice, 1, NULL, 0, 0);
	TRY("mbind", SYS_mbind, NULL, 0, 0, NULL, 0, 0);
	TRY("move_pages", SYS_move_pages, 0, 0, NULL, NULL, NULL, 0);
	TRY("ioctl:terminal", SYS_ioctl, 0, 0x5412, "x");
	TRY("landlock", SYS_landlock_create_ruleset, NULL, 0, 1);
	TRY("seccomp:notify", SYS_seccomp, 1, 8, NULL);
#ifdef __x86_64__
	TRY("iopl", SYS_iopl, 3);
	TRY("ioperm", SYS_ioperm, 0, 1, 1);
	TRY("modify_ldt", SYS_modify_ldt, 1, data, 16);
	TRY("x32", 0x40000000L + SYS_openat, AT, "/etc/passwd", O_RDONLY);
#endif
}

static void all(char *out, const char *secret, int agent)
{
	files(out, secret);
	network(out);
	processes(out, agent);
	kernel(out);
}

__attribute__((constructor)) static void loaded(void)
{
	all(at_load, SECRET, 2);
}

/* read: pid of the agent (int). write: what the calls got, and what they got at load. SECRET is a file of the host. */
F(probe)
{
	int agent;

	memcpy(&agent, r[0].buf, sizeof agent);
	memset(w[0].buf, 0, w[0].size);
	all(w[0].buf, SECRET, agent);
	memcpy(w[1].buf, at_load, w[1].size);
	return 0;
}

static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;

static void *wait(void *nothing)
{
	pthread_mutex_lock(&gate);
	pthread_mutex_unlock(&gate);
	return nothing;
}

/* Threads without bound: how many there could be, at most 4096. */
F(threads)
{
	pthread_t started[4096];
	pthread_attr_t small;
	int count = 0;

	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 65536);
	pthread_mutex_lock(&gate);
	while (count < 4096 && !pthread_create(&started[count], &small, wait, NULL))
		count++;
	pthread_mutex_unlock(&gate);
	for (int i = 0; i < count; i++)
		pthread_join(started[i], NULL);
	memcpy(w[0].buf, &count, sizeof count);
	return 0;
}

/* Memory without bound: how many MiB could be mapped and touched. */
F(memory)
{
	int64_t count = 0;
	char *block;

	while ((block = mmap(NULL, 16 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) != MAP_FAILED) {
		memset(block, 1, 16 << 20);
		count += 16;
	}
	memcpy(w[0].buf, &count, sizeof count);
	return 0;
}

#ifdef __x86_64__
/* The 32-bit way into the kernel: getpid. */
F(old_entry)
{
	long result;

	__asm__ volatile("int $0x80" : "=a"(result) : "a"(20) : "memory");
	return result > 0 ? 0 : 1;
}
#endif
