// Preloaded into the commands of a launch by launching.py: a Python process lets a warm process (warm.py) fork its
// program, which saves the time for importing torch, and stands for it from then on.
//
// This process stays what its parent started. It passes signals on to the fork and ends as the fork ends, with the same
// exit code or by the same signal. If it is killed itself, the warm process kills the fork. Where the warm process
// refuses or is not there, the constructor returns and Python starts as usual.
#include <dirent.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

namespace {
constexpr int MOST_FILES = 250;  // of one message: SCM_MAX_FD is 253
constexpr int WITHOUT_WARM_PROCESS = 70;

enum Kind : int { STARTED = 1, ENDED = 2, KILLED = 3 };  // as in warm.py

struct News {
    int kind, value;  // the process number, exit code or signal
};

bool is_python() {
    char path[4096];
    const ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
    if (n <= 0) return false;
    path[n] = 0;
    const char* name = strrchr(path, '/');
    return name && strncmp(name + 1, "python", 6) == 0;
}

int open_files(int* files) {  // -1: too many
    DIR* folder = opendir("/proc/self/fd");
    if (!folder) return -1;
    int n = 0;
    while (const dirent* entry = readdir(folder)) {
        if (entry->d_name[0] == '.' || atoi(entry->d_name) == dirfd(folder)) continue;
        if (n == MOST_FILES) n = MOST_FILES + 1;
        if (n < MOST_FILES) files[n++] = atoi(entry->d_name);
        if (n > MOST_FILES) break;
    }
    closedir(folder);
    return n <= MOST_FILES ? n : -1;
}

int connected(const char* path) {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    if (strlen(path) >= sizeof address.sun_path) return -1;
    strcpy(address.sun_path, path);
    const int link = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (link >= 0 && connect(link, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0) return link;
    if (link >= 0) close(link);
    return -1;
}

bool sent(int link, int* files, int n) {
    char control[CMSG_SPACE(sizeof(int) * MOST_FILES)] = {};
    iovec content = {files, sizeof(int) * n};
    msghdr message = {};
    message.msg_iov = &content;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(sizeof(int) * n);
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int) * n);
    memcpy(CMSG_DATA(header), files, sizeof(int) * n);
    return sendmsg(link, &message, MSG_NOSIGNAL) == static_cast<ssize_t>(sizeof(int) * n);
}

[[noreturn]] void end_by(int number) {
    const rlimit nothing = {0, 0};
    setrlimit(RLIMIT_CORE, &nothing);
    signal(number, SIG_DFL);
    sigset_t only;
    sigemptyset(&only);
    sigaddset(&only, number);
    raise(number);
    sigprocmask(SIG_UNBLOCK, &only, nullptr);
    _exit(128 + number);
}

// Return whether the warm process has refused.
bool stand_for_fork(int link, int signals) {
    int fork = 0;
    pollfd sources[] = {{link, POLLIN, 0}, {signals, POLLIN, 0}};
    for (;;) {
        if (poll(sources, fork ? 2 : 1, -1) < 0) continue;  // a signal before the fork waits
        if (fork && sources[1].revents) {
            signalfd_siginfo arrived;
            if (read(signals, &arrived, sizeof arrived) == sizeof arrived && arrived.ssi_signo != SIGCHLD)
                kill(fork, static_cast<int>(arrived.ssi_signo));
        }
        if (!sources[0].revents) continue;
        News news;
        if (recv(link, &news, sizeof news, MSG_WAITALL) != sizeof news) {
            if (!fork) return true;
            kill(fork, SIGKILL);
            _exit(WITHOUT_WARM_PROCESS);
        }
        if (news.kind == STARTED) fork = news.value;
        if (news.kind == ENDED) _exit(news.value);
        if (news.kind == KILLED) end_by(news.value);
    }
}

__attribute__((constructor)) void start_warm() {
    const char* place = getenv("MPITRAIN_TESTS_WARM");
    if (!place || !*place || !is_python()) return;
    const char* rank = getenv("OMPI_COMM_WORLD_RANK");
    if (!rank) rank = getenv("PMI_RANK");
    // Two warm processes, one for odd ranks: the ranks of a launch then order sets of strings differently, as usual.
    char path[200];
    if (snprintf(path, sizeof path, "%s-%d", place, rank ? atoi(rank) % 2 : 0) >= static_cast<int>(sizeof path)) return;
    int files[MOST_FILES];
    const int n = open_files(files);
    if (n < 0) return;
    const int link = connected(path);
    if (link < 0) return;
    sigset_t all, before;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, &before);
    const int signals = signalfd(-1, &all, SFD_CLOEXEC);
    if (signals >= 0 && sent(link, files, n)) stand_for_fork(link, signals);
    close(link);
    if (signals >= 0) close(signals);
    sigprocmask(SIG_SETMASK, &before, nullptr);
}
}  // namespace
